"""Bad models, disks and settings as a user meets them: one line that names the fault, its numbers
and the remedy, and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal

import pytest
import tiny
import torch
import typer
import yaml
from job_files import arguments, commands, rows_by_id
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from flexgen_ray.cli.main import app
from flexgen_ray.engine import engine
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.models.config_files import load_config, load_sampling_defaults
from flexgen_ray.paths import hardware_file


@pytest.fixture
def model(text_model, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(text_model, tmp_path / "model")


@pytest.fixture
def refused(run_here, files, model):
    """Runs the job, which can't, and returns what is said."""

    def call(*options: object) -> str:
        done = run_here(*arguments(files, model, "--no-use-ray", *options))
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr and not (files / "out.jsonl").exists()
        assert done.stderr.count("flexgen-ray: error: ") == 1
        assert not (files / "offload").exists() or not [*(files / "offload").iterdir()]
        return done.stderr.splitlines()[-1]

    return call


@pytest.fixture
def answered(run_here, files, model):
    """Runs the job and returns its rows and what is said."""

    def call(*options: object) -> tuple[dict[str, dict], str]:
        done = run_here(*arguments(files, model, "--no-use-ray", *options))
        assert done.returncode in (0, 2), done.stderr
        return rows_by_id(files / "out.jsonl"), done.stderr

    return call


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([float("nan")] * 2, [], "2 NaN and 0 infinite values of 1536"),
        ([float("-inf"), float("nan")], [], "1 NaN and 1 infinite values of 1536"),
        ([7e4], ["--dtype", "float16"], "1 values of 1536 beyond 65504, .* use --dtype bfloat16"),
    ],
)
def test_weights_that_are_no_numbers_are_named(refused, model, values, options, words):
    path, name = model / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name].view(-1)[-len(values) :] = torch.tensor(values)
    save_file(tensors, path, {"format": "pt"})
    said = refused(*options)
    assert f"model.safetensors: {name} holds" in said
    assert re.search(words, said), said


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_place_of_a_nan_is_seen_in_any_dtype(model, dtype):
    path, name = model / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    whole = load_file(path)
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        tensors = {key: it.to(stored, copy=True) for key, it in whole.items()}
        for place in (0, 700, -1, None):
            if place is not None:
                tensors[name].view(-1)[place] = float("nan")
            save_file(tensors, path, {"format": "pt"})
            checkpoint = Checkpoint(model, load_config(model))
            both = torch.empty(2, *tensors[name].shape, dtype=getattr(torch, dtype))
            into = both.flatten(0, 1)
            if place is None:
                checkpoint.read_into(1, "gate_up_proj.weight", into)
                assert torch.equal(both[1], tensors[name].to(into.dtype))
                continue
            with pytest.raises(ValueError, match=f"{name} holds 1 NaN"):
                checkpoint.read_into(1, "gate_up_proj.weight", into)
            tensors[name] = whole[name].to(stored, copy=True)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 5}', '{"weight_map": {"x": "a"}}'])
def test_a_damaged_index_is_named(refused, model, index):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refused()


def test_another_model_s_tokenizer_is_named_before_any_work(refused, model):
    tiny.save("llama", model, vocab_size=50)
    said = refused()
    assert "the tokenizer has 97 tokens, but the model 50 (vocab_size in config.json)" in said


def test_a_damaged_tokenizer_is_named_before_any_work(refused, model):
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    assert "the tokenizer can't be loaded" in refused()


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    ],
)
def test_a_panic_of_the_tokenizers_library_is_a_named_error(refused, model, part):
    """The first while it is loaded, the second at the first text."""
    keys = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(keys | part))
    said = refused()
    assert str(model) in said and "download" in said


def test_an_added_token_that_the_model_lacks_costs_its_line_only(answered, files, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("<pad>", special=True)])
    tokenizer.save_pretrained(model)
    (files / "in.jsonl").write_text('{"prompt": "Hi<pad>"}\n{"prompt": "Hi"}')
    found, _ = answered()
    assert "token id 97" in found["line-1"]["response"]["body"]["error"]["message"]
    assert found["line-2"]["response"]["status_code"] == 200


def test_without_a_tokenizer_token_ids_are_answered_and_texts_are_told(answered, model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    found, _ = answered()
    assert found["ids"]["response"]["status_code"] == 200
    assert "has no tokenizer" in found["batch"]["response"]["body"]["error"]["message"]


def test_a_full_offload_disk_is_named_before_any_work(refused, files, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    said = refused()
    for words in ("cannot reserve", "No space left", "is free", "--offload-dir", str(files)):
        assert words in said


def test_a_file_system_without_direct_requests_works_and_is_warned_of(
    answered,
    files,
    monkeypatch,
    caplog,
):
    real, asked = fcntl.fcntl, []

    def without(fd, command, argument=0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            asked.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, argument)

    wanted, _ = answered()
    (files / "out.jsonl").unlink()
    caplog.clear()
    monkeypatch.setattr(fcntl, "fcntl", without)
    found, _ = answered()
    assert len(asked) > 1
    assert [it.message for it in caplog.records if "O_DIRECT" in it.message] == [
        f"{files / 'offload'} takes no direct requests (O_DIRECT): offloaded data also fills the "
        "page cache, beside --cpu-memory; choose an --offload-dir on a local disk if memory is "
        "short"
    ]
    for name, row in wanted.items():
        assert found[name]["response"]["body"].get("choices") == row["response"]["body"].get(
            "choices"
        )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [(Checkpoint, "read_into"), (engine, "choose_policy")])
def test_stopped_while_it_loads_or_plans_nothing_is_left(
    run_here,
    files,
    model,
    monkeypatch,
    number,
    where,
):
    stopped: list[int] = []

    def stop(*_: object) -> None:
        # A second one would end this process at once.
        if not stopped:
            stopped.append(number)
            signal.raise_signal(number)

    monkeypatch.setattr(*where, stop)
    done = run_here(*arguments(files, model, "--no-use-ray"))
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "flexgen-ray: stopped"
    assert "Traceback" not in done.stderr and not (files / "out.jsonl").exists()
    assert not [*files.glob("offload/*")]


def test_an_empty_input_is_told_and_a_folder_is_refused(run_here, refused, files, model):
    assert f"{model} is a folder; --input takes" in refused("--input", model)
    (files / "in.jsonl").write_text("\n \n")
    done = run_here(*arguments(files, model, "--no-use-ray"))
    assert done.returncode == 0 and "in.jsonl holds no requests" in done.stderr
    assert (files / "out.jsonl").read_text() == ""


def test_a_calibration_of_another_version_is_named_with_its_key_and_can_be_replaced(
    refused, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hardware_file().parent.mkdir(parents=True)
    old = yaml.safe_load(Hardware.preset("cpu").to_yaml()) | {"gpu_rates": 5}
    hardware_file().write_text(yaml.safe_dump(old))
    said = refused()
    for words in (str(hardware_file()), "unknown key 'gpu_rates'", "`flexgen-ray calibrate`"):
        assert words in said


def generation(model, **values) -> None:
    (model / "generation_config.json").write_text(json.dumps(values))


def test_each_of_a_list_of_end_tokens_ends_an_answer(answered, files, model):
    (files / "in.jsonl").write_text('{"prompt": "Hello there", "max_tokens": 30}')

    def answer() -> dict:
        found, _ = answered("--overwrite")
        return found["line-1"]["response"]["body"]

    whole = answer()["choices"][0]["text"]
    ends = [ord(whole[9]) - 30, ord(whole[6]) - 30]
    generation(model, eos_token_id=ends)
    first = min(place for place, it in enumerate(whole) if ord(it) - 30 in ends)
    body = answer()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == first + 1


def test_the_model_s_own_sampling_counts_where_nobody_says(run_here, files, model):
    own = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3}
    prompt = {"prompt": "Hello there"}

    def texts(line: dict, *options: object) -> list[str]:
        (files / "in.jsonl").write_text("\n".join([json.dumps(prompt | line)] * 4))
        job = arguments(files, model, "--no-use-ray", "--overwrite")
        at = job.index("--temperature")
        job = [*job[:at], *job[at + 2 :], *options]
        job.remove("--max-tokens")
        job.remove(3)
        assert run_here(*job).returncode == 0
        found = rows_by_id(files / "out.jsonl").values()
        return [row["response"]["body"]["choices"][0]["text"] for row in found]

    plain = texts({"max_tokens": 9, "temperature": 0})
    said = texts(own | {"max_tokens": 9})
    generation(model, max_new_tokens=9, **own)
    assert texts({}) == said != plain and len(set(said)) == 4
    assert texts({"temperature": 0.2}) == texts(own | {"max_tokens": 9, "temperature": 0.2})
    assert texts({}, "--temperature", 0.2, "--max-tokens", 4) == texts(
        own | {"max_tokens": 4, "temperature": 0.2}
    )
    generation(model, do_sample=False, max_new_tokens=9, temperature=0.7)
    assert texts({}) == plain


def test_a_generation_config_that_can_t_be_is_named(refused, model):
    assert load_sampling_defaults(model) == {}
    generation(model, temperature="hot")
    said = refused()
    assert "generation_config.json: temperature is 'hot'; it must be 0 (greedy) to 2" in said


def test_each_command_s_help_has_an_example_of_it():
    found = dict(commands(typer.main.get_command(app), "flexgen-ray"))
    assert {"flexgen-ray generate", "flexgen-ray eval cloze", "flexgen-ray bench peers"} <= set(
        found
    )
    for name, command in found.items():
        assert f"Example: {name}" in " ".join((command.help or "").split()), name
        for option in command.params:
            assert option.help or option.name == "help", f"{name}: {option.name}"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"rope_parameters": "x"}, "config.json has a value of the wrong type"),
        ("config.json", {"hidden_size": "wide"}, "hidden_size is 'wide'; it must be an integer"),
        ("config.json", {"num_attention_heads": 0}, "config.json: num_heads is 0; it must be"),
        ("generation_config.json", {"eos_token_id": [1, None]}, "eos_token_id is [1, None]"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is '2'"),
    ],
)
def test_a_config_of_wrong_values_is_named(refused, model, file, change, words):
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in refused()
