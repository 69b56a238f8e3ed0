"""`flexgen-ray qualify`: steps in processes of their own, with limits; whatever happens is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import typer
from job_files import command as flexgen_ray_command
from pretend_cuda import pretend_cuda

from flexgen_ray.cli.main import app
from flexgen_ray.config import Budget, Policy, Workload
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import check_budget
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.budgets import CUDA_RESERVE
from flexgen_ray.qualification import probe as probing
from flexgen_ray.qualification import with_cudnn
from flexgen_ray.qualification.cases import CASES, GPU_MEMORY, PROMPT_LEN
from flexgen_ray.qualification.link import two_dimensional
from flexgen_ray.qualification.mixture import mixture
from flexgen_ray.qualification.predictions import predict
from flexgen_ray.qualification.runner import STEPS, failures, run_steps
from flexgen_ray.qualification.setting import Figures, Setting, Skipped, read_figures
from flexgen_ray.qualification.steps import Step, make_steps, write_policies
from flexgen_ray.qualification.two_actors import MAX_TOKENS
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.units import parse_bytes

USUAL_SECONDS = 520
ORDER = [
    "probe", "gpu_tests", "opt-30b", "opt-6.7b-4bit", "opt-6.7b", "opt-6.7b-cudnn", "calibrate",
    "predictions", "opt-30b-4bit", "mixture", "two_actors", "nccl",
]  # fmt: skip


def step(script: str, name: str = "step", limit_s: float = 20, **options) -> Step:
    return Step(name, [sys.executable, "-c", script], f"{name}.jsonl", 1, limit_s, **options)


def run(steps: list[Step], folder: Path, seconds: float = 60) -> list[dict]:
    begun: list[str] = []
    lines = list(run_steps(steps, folder, seconds, begun.append))
    assert begun == [line["step"] for line in lines]
    assert [json.loads(line) for line in (folder / STEPS).read_text().splitlines()] == lines
    return lines


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder in which steps get their folders for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_the_most_valuable_steps_come_first_and_all_fit_the_time(tmp_path):
    steps = make_steps(Setting("cuda", tmp_path))
    assert [each.name for each in steps] == ORDER
    assert sum(each.least_s for each in steps) < USUAL_SECONDS < 9 * 60
    assert all(each.least_s <= each.limit_s for each in steps)
    (seconds,) = (
        it for it in typer.main.get_command(app).commands["qualify"].params if it.name == "seconds"
    )
    assert seconds.default == USUAL_SECONDS


def test_every_command_can_be_parsed_and_reads_the_policy_that_is_written(tmp_path):
    setting = Setting("cuda", tmp_path)
    write_policies(setting)
    policies = {tmp_path / f"{case.name}.yaml": case.policy for case in CASES}
    assert {path: Policy.from_yaml(path) for path in policies} == policies
    bench = typer.main.get_command(app).commands["bench"].get_command(None, "throughput")
    for each in make_steps(setting):
        _, option, module, *arguments = each.command
        assert option == "-m" and find_spec(module)
        if arguments[:1] == ["bench"]:
            values = bench.make_context("throughput", arguments[2:]).params
            assert values["policy"] in policies and values["gpu_memory"] == "16GiB"
            assert values["json_file"] == tmp_path / each.figures
            assert (module == "flexgen_ray") == (each.name != "opt-6.7b-cudnn")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_policy_fits_the_memory_that_its_case_asks_for(case):
    config = shape_config(case.model)
    length = PROMPT_LEN + case.max_tokens
    workload = Workload(case.policy.block_size, PROMPT_LEN, length)
    layers = StageLayers.whole(config.num_layers)
    plan = StagePlan(config, layers, case.policy, workload, "float16", False, 1, False)
    gpu, cpu = parse_bytes(GPU_MEMORY) - CUDA_RESERVE, parse_bytes(case.cpu_memory)
    check_budget(plan, Budget(gpu, cpu, 0))


def test_a_step_that_hangs_is_killed_with_all_of_its_processes(tmp_path, temporary):
    """The step's child is killed too, though it has a session of its own, and later steps run."""
    script = (
        "import subprocess, sys, time, pathlib, tempfile\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],\n"
        "    start_new_session=True)\n"
        f"figures = pathlib.Path({str(tmp_path / 'hangs.jsonl')!r})\n"
        "pathlib.Path(tempfile.mkdtemp(), 'left').touch()\n"
        'figures.write_text(\'{"pid": %d}\\n{"torn\' % child.pid)\n'
        "time.sleep(60)\n"
    )
    lines = run([step(script, "hangs", limit_s=2), step("print('hello')", "next")], tmp_path)
    hangs, after = lines
    assert hangs["status"] == "killed" and "more than 2 s" in hangs["reason"]
    assert hangs["killed_processes"] == 2 and after["status"] == "passed"
    (figures,) = hangs["figures"]
    assert not is_running(figures["pid"])
    assert list(temporary.iterdir()) == [] and failures(lines) == ["hangs"]


def test_a_step_that_ends_leaves_no_process(tmp_path, temporary):
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'step.jsonl')!r}, 'w').write('{{\"pid\": %d}}\\n' % child.pid)\n"
    )
    (line,) = run([step(script)], tmp_path)
    assert line["status"] == "passed" and line["killed_processes"] == 1
    assert not is_running(line["figures"][0]["pid"])


def test_a_step_that_fails_is_told_with_the_end_of_its_output(tmp_path, temporary):
    fails = step("print('x' * 9000); raise SystemExit('no such GPU')", "fails")
    lines = run([fails, step("pass", "next")], tmp_path)
    assert [line["status"] for line in lines] == ["failed", "passed"]
    assert lines[0]["tail"].rstrip().endswith("no such GPU") and len(lines[0]["tail"]) <= 2000
    assert lines[0]["reason"] == "exit status 1" and failures(lines) == ["fails"]
    assert "tail" not in lines[1]


def test_a_step_without_enough_time_or_memory_is_skipped_and_says_what_it_lacks(tmp_path):
    slow = Step("slow", ["never run"], "slow.jsonl", 50, 60)
    lines = run([slow, step("raise SystemExit(1)", "large", host_bytes=2**60)], tmp_path, 40)
    assert [line["status"] for line in lines] == ["skipped", "skipped"] and not failures(lines)
    assert lines[0]["reason"] == "40 s left, and it needs 50 s"
    assert "host memory free, and it needs 1048576.0 TiB" in lines[1]["reason"]


def test_a_step_that_skips_itself_says_why(tmp_path, temporary):
    path = tmp_path / "step.jsonl"
    (line,) = run([step(f'open({str(path)!r}, "w").write(\'{{"skipped": "no GPU"}}\')')], tmp_path)
    assert (line["status"], line["reason"]) == ("skipped", "no GPU")


def test_a_run_that_is_stopped_leaves_whole_lines_and_nothing_else(tmp_path):
    """As by Ctrl-C or the end of a lease, while a step runs."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = (
        "import sys, pathlib\n"
        "from flexgen_ray.qualification.runner import run_steps\n"
        "from flexgen_ray.qualification.steps import Step\n"
        "from flexgen_ray.signals import raise_on_stop\n"
        "raise_on_stop()\n"
        "sleep = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "steps = [Step(name, [sys.executable, '-c', code], 'none', 1, 60)\n"
        "         for name, code in (('quick', 'pass'), ('long', sleep))]\n"
        "list(run_steps(steps, pathlib.Path(sys.argv[1]), 100, str))\n"
    )
    environment = os.environ | {"TMPDIR": str(temporary)}
    runner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL
    )
    log, deadline = tmp_path / "long.log", time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline and runner.poll() is None
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(30) != 0
    (line,) = (tmp_path / STEPS).read_text().splitlines(keepends=True)
    assert line.endswith("\n") and json.loads(line)["step"] == "quick"
    assert not is_running(int(log.read_text()))
    assert list(temporary.iterdir()) == []


def test_a_question_that_fails_loses_no_other(tmp_path, monkeypatch):
    def good(device, is_tiny):
        yield {"device": device.type, "tiny": is_tiny}

    def bad(device, is_tiny):
        yield {"half": True}
        raise RuntimeError("CUDA error")

    def impossible(device, is_tiny):
        raise Skipped("needs two GPUs")
        yield

    monkeypatch.setattr(probing, "QUESTIONS", (bad, impossible, good))
    with pytest.raises(SystemExit, match="bad"):
        probing.probe(Setting("cpu", tmp_path, True), Figures(tmp_path / "probe.jsonl"))
    half, error, skipped, last = read_figures(tmp_path / "probe.jsonl")
    assert half == {"question": "bad", "half": True} and "CUDA error" in error["error"]
    assert skipped == {"question": "impossible", "skipped": "needs two GPUs"}
    assert last == {"question": "good", "device": "cpu", "tiny": True}


def test_the_probe_answers_on_a_cpu_what_a_cpu_can(tmp_path):
    probing.probe(Setting("cpu", tmp_path, True), Figures(tmp_path / "probe.jsonl"))
    figures = read_figures(tmp_path / "probe.jsonl")
    assert [*dict.fromkeys(each["question"] for each in figures)] == [
        question.__name__ for question in probing.QUESTIONS
    ]
    skipped = {each["question"] for each in figures if "skipped" in each}
    assert skipped == {"driver", "both_directions", "overtaking", "two_dimensional"}
    assert all(each["same_bytes"] for each in figures if each["question"] == "quantization")
    assert all("error" not in each for each in figures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself is there")
def test_the_questions_for_a_gpu_can_be_asked(tmp_path, monkeypatch):
    """On a pretend one; it has neither Triton's kernels nor the CUDA runtime's own library."""
    needy = (probing.quantization, two_dimensional)
    questions = [it for it in probing.QUESTIONS if it not in needy]
    monkeypatch.setattr(probing, "QUESTIONS", questions)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pretend_cuda():
        probing.probe(Setting("cuda", tmp_path, True), Figures(tmp_path / "probe.jsonl"))
    figures = read_figures(tmp_path / "probe.jsonl")
    assert not [each for each in figures if "error" in each]
    assert {it["question"] for it in figures if "skipped" in it} == {"driver"}
    assert figures[0]["device_name"] == "pretend"


def test_cudnn_stays_allowed_when_a_run_forbids_it(monkeypatch):
    forbid = torch.backends.cuda.enable_cudnn_sdp
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", forbid)
    try:
        forbid(False)
        with_cudnn.allow_cudnn()
        torch.backends.cuda.enable_cudnn_sdp(False)
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        forbid(before)


def test_a_prediction_stands_beside_what_was_measured():
    case = CASES[-1].tiny()
    run = {
        "doubtful": ["others"],
        "num_prompts": 4,
        "generated_tokens_per_s": 9e3,
        "decode_tokens_per_s": 8e3,
    }
    figures = predict(case, run, Hardware.preset("h100"))
    for name, rate in figures["measured"].items():
        assert rate == run[name]
        ratio = figures["measured_to_predicted"][name]
        assert ratio == pytest.approx(rate / figures["predicted"][name], rel=0.01)
    assert figures["doubtful"] == ["others"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "cpu"], "add --tiny"),
        (["--device", "cpu", "--tiny", "--steps", "probe,nothing"], "no step 'nothing'"),
        (["--device", "cpu", "--tiny", "--output", "."], "give the name of a new folder"),
    ],
)
def test_what_can_not_work_is_refused_before_any_step(
    tmp_path, monkeypatch, run_here, arguments, said
):
    monkeypatch.chdir(tmp_path)
    done = run_here("qualify", "--output", "out", *arguments)
    assert done.returncode and said in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_one_result_and_its_status_says_if_a_step_failed(
    tmp_path, monkeypatch, run_here, temporary
):
    fails = step("raise SystemExit(3)", "fails")
    monkeypatch.setattr(
        "flexgen_ray.qualification.steps.make_steps", lambda setting: [step("pass"), fails]
    )
    options = ["--device", "cpu", "--tiny", "--output"]
    done = run_here("qualify", *options, tmp_path / "one", "--steps", "step")
    assert done.returncode == 0 and "step: passed" in done.stderr
    done = run_here("qualify", *options, tmp_path / "two")
    assert done.returncode == 1 and "steps that failed: fails" in done.stderr
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["statuses"] == {"failed": 1, "passed": 1} and result["tiny"]
    assert {"hardware", "versions", "command", "date"} <= set(result)


def test_a_mixture_gives_the_tokens_of_transformers_and_others_fail(tmp_path, monkeypatch):
    setting = Setting("cpu", tmp_path)
    mixture(setting, Figures(tmp_path / "right.jsonl"))
    figures = read_figures(tmp_path / "right.jsonl")
    assert len({it["weights"] for it in figures}) == 3
    assert all(it["equal_to_transformers"] == it["answers"] == 7 for it in figures)

    def wrong(*args, **options):
        return [[0] * MAX_TOKENS] * 7

    monkeypatch.setattr("flexgen_ray.qualification.mixture.answers", wrong)
    with pytest.raises(AssertionError, match="on the device"):
        mixture(setting, Figures(tmp_path / "wrong.jsonl"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_step_runs_tiny_on_a_cpu(tmp_path):
    output = tmp_path / "qualification"
    command = flexgen_ray_command(
        "qualify", "--device", "cpu", "--tiny", "--seconds", 1700, "--output", output
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "result.json").read_text())
    steps = {line["step"]: line for line in result["steps"]}
    assert list(steps) == ORDER
    skipped = {name: it["reason"] for name, it in steps.items() if it["status"] == "skipped"}
    assert set(skipped) == {"gpu_tests", "nccl"} and all(skipped.values())
    assert all(line["status"] == "passed" for line in steps.values() if "reason" not in line)
    assert Hardware.load(output / "machine.yaml").device.is_cpu
    pairs = {(it["case"], it["rates"]) for it in steps["predictions"]["figures"]}
    before = [name for name in ORDER[: ORDER.index("predictions")] if name.startswith("opt")]
    assert pairs == {(name, rates) for name in before for rates in ("preset cpu", "calibrated")}
    (figures,) = steps["two_actors"]["figures"]
    assert figures["equal_to_one_process"] == figures["equal_to_transformers"] == 7
