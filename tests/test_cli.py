"""The command as a user runs it: files in, files out, faults with one line, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
import yaml
from job_files import POLICY, arguments, command, rows_by_id, run

from flexgen_ray.units import parse_bytes


def assert_answers(files: Path) -> None:
    answers = rows_by_id(files / "out.jsonl")
    assert set(answers) == {"batch", "line-2", "line-3", "long", "full", "ids", "bad ids", "empty"}
    status = {key: row["response"]["status_code"] for key, row in answers.items()}
    assert {key for key, code in status.items() if code == 200} == {
        "batch",
        "line-2",
        "full",
        "ids",
    }
    message = answers["long"]["response"]["body"]["error"]["message"]
    assert "500 tokens" in message and str(tiny.CONTEXT) in message
    full = answers["full"]["response"]["body"]
    assert full["usage"]["completion_tokens"] == tiny.CONTEXT - 150
    assert full["choices"][0]["finish_reason"] == "length"
    usage = answers["batch"]["response"]["body"]["usage"]
    assert usage == {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    assert len(answers["ids"]["response"]["body"]["choices"][0]["text"]) <= 3


def test_generate_in_this_process(run_here, files, text_model):
    more = "--no-use-ray", "--report", files / "report.json"
    done = run_here(*arguments(files, text_model, *more))
    assert done.returncode == 2, done.stderr
    assert_answers(files)
    report = json.loads((files / "report.json").read_text())
    assert report["generated_tokens"] == 5 + 4 + 10 + 3 and report["requests"] == 4
    assert report["policy"]["weights"] == POLICY["weights"] and report["decode_s"] > 0
    assert report["hardware"]["cpu"] and report["versions"]["torch"]
    assert "4 lines got an error row" in done.stderr
    assert re.match(r"\d\d:\d\d:\d\d starting\n", done.stderr)
    assert "generated tokens/s" in done.stderr and "prefill" in done.stderr
    assert "disk:" in done.stderr and "weights" in done.stderr
    assert list((files / "offload").iterdir()) == []


@pytest.mark.slow
def test_generate_in_a_ray_actor_of_its_own(files, text_model):
    done = run(*arguments(files, text_model))
    assert done.returncode == 2, done.stderr
    assert_answers(files)
    assert list((files / "offload").iterdir()) == []


def test_a_cluster_that_does_not_answer_is_named_at_once(files, text_model):
    done = run(*arguments(files, text_model, "--address", "127.0.0.1:9"))
    assert done.returncode == 1 and "no Ray cluster answers at 127.0.0.1:9" in done.stderr


def test_output_with_content_is_spared(run_here, files, text_model):
    (files / "out.jsonl").write_text("precious\n")
    done = run_here(*arguments(files, text_model, "--no-use-ray"))
    assert done.returncode == 1 and "--overwrite" in done.stderr
    assert (files / "out.jsonl").read_text() == "precious\n"
    assert run_here(*arguments(files, text_model, "--no-use-ray", "--overwrite")).returncode == 2
    assert_answers(files)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weights": {"gpu": 0.5, "cpu": 0.2}}, "sums to 0.7"),
        ({"weights": {"gpu": 50, "cpu": 50}}, "fractions, not percents"),
        ({"wieghts": {"gpu": 1}}, "unknown key 'wieghts'"),
        ({"cache": {"gpu": 1, "ssd": 0}}, "unknown key 'ssd'"),
        ({"cache": 0.5}, "cache is 0.5"),
        ({"gpu_batch_size": 0}, "gpu_batch_size is 0"),
        ({"num_gpu_batches": 1.5}, "num_gpu_batches is 1.5"),
        ({"cpu_attention": 2}, "cpu_attention is 2"),
        ({"gpu_batch_size": 10**9}, "--gpu-memory"),
    ],
)
def test_a_wrong_policy_is_refused_before_any_work(run_here, files, text_model, change, complaint):
    (files / "policy.yaml").write_text(yaml.safe_dump(POLICY | change))
    done = run_here(*arguments(files, text_model, "--no-use-ray"))
    assert done.returncode == 1 and complaint in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (files / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpu-memory", "40KiB"], "on the gpu tier"),
        (["--cpu-memory", "1KiB"], "on the cpu tier"),
        (["--disk-memory", "1KiB"], "on the disk tier"),
        (["--gpu-memory", "900TiB"], "free"),
        (["--gpu-memory", "16 apples"], "16GiB"),
        (["--device", "cuda"], "no CUDA device"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--model", "/nowhere"], "has no folder /nowhere"),
        (["--input", "/nowhere.jsonl"], "/nowhere.jsonl does not exist"),
        (["--output", "/nowhere/out.jsonl"], "/nowhere does not exist"),
        (["--policy", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--offload-dir", "/proc/nowhere"], "another --offload-dir"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(run_here, files, text_model, options, complaint):
    if options[0] == "--device" and _has_cuda():
        pytest.skip("this machine has CUDA")
    done = run_here(*arguments(files, text_model, "--no-use-ray", *options))
    assert done.returncode == 1 and complaint in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (files / "out.jsonl").exists()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    if how == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif how == "lying header":
        weights.write_bytes((10**15).to_bytes(8, "little") + content[8:])
    elif how == "no weights":
        weights.unlink()
    elif how == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "other shape":
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    elif how == "more layers":
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    elif how == "other architecture":
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2Model"]}))
    elif how == "rope":
        rope = {"rope_type": "spiral", "rope_theta": 1e4}
        (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    elif how == "config":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("truncated", "truncated or damaged"),
        ("lying header", "truncated or damaged"),
        ("no weights", "holds no *.safetensors"),
        ("pickle only", "pickles"),
        ("other shape", "has shape [48, 32]"),
        ("more layers", "no safetensors file holds"),
        ("other architecture", "supported are OPTForCausalLM, LlamaForCausalLM"),
        ("rope", "'spiral'"),
        ("config", "not valid JSON"),
    ],
)
def test_a_damaged_model_is_named(run_here, files, tmp_path, how, complaint):
    folder = tiny.save("llama", tmp_path / "model")
    tiny.add_tokenizer(folder)
    _damage(folder, how)
    done = run_here(*arguments(files, folder, "--no-use-ray"))
    assert done.returncode == 1 and complaint in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (files / "out.jsonl").exists()


def test_stop_strings_end_an_answer_and_are_cut_off(run_here, files, text_model):
    def answer(**more) -> dict:
        line = {"prompt": "Hello there", "max_tokens": 30, "temperature": 0, **more}
        (files / "in.jsonl").write_text(json.dumps(line))
        assert (
            run_here(*arguments(files, text_model, "--no-use-ray", "--overwrite")).returncode == 0
        )
        return rows_by_id(files / "out.jsonl")["line-1"]["response"]["body"]

    whole = answer()["choices"][0]["text"]
    assert len(whole) == 30
    stop = whole[9:12]
    cut = answer(stop=["never said", stop])
    assert cut["choices"][0]["text"] == whole[: whole.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] == whole.index(stop) + 3


def offloaded(folder: Path) -> set[str]:
    """Nameless files in the folder that some process holds open."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                found.add(os.readlink(link))
    return {path for path in found if path.startswith(str(folder))}


@pytest.mark.parametrize(
    ("how", "where"),
    [
        (signal.SIGKILL, ["--no-use-ray"]),
        pytest.param(signal.SIGTERM, ["--no-use-ray"], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, ["--no-use-ray"], marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, ["--pipeline-parallel-size", "2"], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_leaves_whole_lines_and_no_offload_files(
    run_here, files, text_model, how, where
):
    lines = [json.dumps({"prompt": "Once upon a time" * 3, "max_tokens": 60}) for _ in range(400)]
    (files / "in.jsonl").write_text("\n".join(lines))
    offload = files / "offload"
    offload.mkdir()
    (offload / "someone-elses").write_text("keep me")
    job = subprocess.Popen(
        command(*arguments(files, text_model, *where)), stderr=subprocess.PIPE, text=True
    )
    output = files / "out.jsonl"
    deadline = time.monotonic() + 60
    while not (output.exists() and output.read_text().count("\n") > 4):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    assert offloaded(offload)
    job.send_signal(how)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode in (-9, 130) and "Traceback" not in stderr
    assert 4 < len(rows_by_id(output)) < 400
    assert not offloaded(offload)
    assert [path.name for path in offload.iterdir()] == ["someone-elses"]
    (files / "in.jsonl").write_text(lines[0])
    again = run_here(*arguments(files, text_model, "--no-use-ray", "--overwrite"))
    assert again.returncode == 0
    assert [path.name for path in offload.iterdir()] == ["someone-elses"]


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["plan", "--help"]])
def test_help_comes_at_once(arguments):
    """What takes seconds to import is none of its business."""
    code = "import sys; from flexgen_ray.cli.main import main\n"
    code += f"sys.argv[1:] = {arguments}\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print({'torch', 'ray', 'numpy', 'highspy', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


def test_info_tells_what_a_run_would_use(run_here, tmp_path):
    done = run_here("info", "--offload-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    found = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert found["offload folder"] == str(tmp_path)
    # Metadata name the release; CUDA builds add a tag to it only in the module.
    assert f"torch {torch.__version__.split('+')[0]}" in found["versions"]
    assert "calibrate" in found["calibrated"]
    sizes = re.findall(r"[\d.]+ [KMGT]iB", found["host memory"])
    free, used = (parse_bytes(size.replace(" ", "")) for size in sizes)
    assert 0 < used < free <= psutil.virtual_memory().total


def test_help_teaches(run_here):
    done = run_here("generate", "--help")
    assert done.returncode == 0
    for word in ("--policy", "--gpu-memory", "Example", "OpenAI", "--resume", "--keep-order"):
        assert word in done.stdout
    assert run_here("--version").stdout.strip()
