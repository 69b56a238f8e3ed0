"""Options of LLM, policies and sampling: every name and value is checked where it enters."""

from __future__ import annotations

import os
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from job_files import commands

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.checks import check_values
from flexgen_ray.cli.main import app
from flexgen_ray.config import LOSSY, Faults
from flexgen_ray.distributed.own_cluster import only_gpu, visible_gpu
from flexgen_ray.engine.options import CHECKS, ELSEWHERE
from flexgen_ray.planner.budgets import settle_budget
from flexgen_ray.runtime.worker import Machine, find_device

OPTIONS = dict(list(signature(LLM.__init__).parameters.items())[1:])


@pytest.mark.parametrize("device", ["gpu", "CUDA", "nonsense", "cuda:", "cuda:x", "cuda:-1", "", 0])
def test_a_device_of_another_name_is_refused_before_anything_starts(text_model, run_here, device):
    with pytest.raises(ValueError, match='device is .*; it must be "auto", "cpu", "cuda", or'):
        LLM(text_model, device=device)
    job = ("--model", text_model, "--input", "in.jsonl", "--output", "out.jsonl")
    refused = run_here("generate", *job, "--device", device)
    assert refused.returncode and '"cuda:N" for the GPU of number N' in " ".join(
        refused.stderr.replace("│", " ").split()
    )


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(text_model, device):
    if torch.cuda.device_count() > 7:
        pytest.skip("a machine with more GPUs than the test asks for")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=f"--device {device}, but .* has no CUDA device"):
            LLM(text_model, device=device, use_ray=False)
    elif device == "cuda:7":
        with pytest.raises(ValueError, match="the last one is cuda:"):
            LLM(text_model, device=device, use_ray=False)
    assert find_device("cpu").type == "cpu"


def test_budgets_of_a_numbered_gpu_are_those_of_any_gpu():
    free = 64 * 2**30, 64 * 2**30, 2**40
    gpu = Machine("here", "cuda:1", "card", *free, 8, True)
    limits = {"gpu": None, "cpu": None, "disk": None}
    assert settle_budget(gpu, limits, 0) == settle_budget(replace(gpu, device="cuda"), limits, 0)
    assert settle_budget(gpu, limits, 0) != settle_budget(replace(gpu, device="cpu"), limits, 0)


@given(st.lists(st.integers(0, 9), min_size=1, unique=True), st.integers(0, 9))
def test_gpus_are_counted_among_those_that_this_process_may_use(visible, number):
    names = ",".join(map(str, visible))
    if number < len(visible):
        assert visible_gpu(names, number) == str(visible[number])
    else:
        with pytest.raises(ValueError, match="counted from 0"):
            visible_gpu(names, number)
    assert visible_gpu(None, number) == str(number)


@pytest.mark.parametrize("before", [None, "4,7"])
def test_a_ray_of_the_run_s_own_sees_the_gpu_of_that_number_alone(monkeypatch, before):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with only_gpu("cuda:1", None) as device:
        assert device == "cuda"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ("7" if before else "1")
    with only_gpu("cuda", "10.0.0.1:6379") as device:
        assert device == "cuda" and os.environ.get("CUDA_VISIBLE_DEVICES") == before
    with pytest.raises(ValueError, match="on a cluster that runs already Ray gives"):
        with only_gpu("cuda:1", "10.0.0.1:6379"):
            pass
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


@pytest.mark.parametrize("name", ELSEWHERE)
def test_options_of_other_systems_say_what_to_use_here(text_model, name):
    assert name not in OPTIONS
    with pytest.raises(TypeError) as refused:
        LLM(text_model, **{name: 1})
    assert str(refused.value) == f"LLM: unknown option {name!r}; {ELSEWHERE[name]}"


@given(st.sampled_from([*OPTIONS][1:]), st.integers(0, 30))
def test_an_option_that_lacks_a_letter_names_the_one_that_was_meant(name, place):
    wrong = name[: place % len(name)] + name[place % len(name) + 1 :]
    if wrong in OPTIONS or wrong in ELSEWHERE or len(wrong) < 4:
        return
    with pytest.raises(TypeError, match=f"LLM: unknown option '{wrong}'; did you mean "):
        LLM("nowhere", **{wrong: 1})


@pytest.mark.parametrize(
    "make, said",
    [
        (
            lambda: Policy(weight_bit=4),
            "Policy: unknown option 'weight_bit'; did you mean weight_bits",
        ),
        (lambda: Policy(w_gpu_percent=20), "use weights=Placement(gpu=..., cpu=..., disk=...)"),
        (lambda: Placement(nvme=1), "Placement: unknown option 'nvme'; use disk"),
        (lambda: SamplingParams(best_of=3), "SamplingParams: unknown option 'best_of'; use n"),
        (lambda: SamplingParams(max_token=3), "did you mean max_tokens?"),
        (lambda: SamplingParams(zebra=3), "known are max_tokens, temperature"),
        (lambda: replace(Policy(), cach=Placement()), "did you mean cache?"),
        (
            lambda: Faults(max_restart=3),
            "Faults: unknown option 'max_restart'; did you mean max_res",
        ),
        (
            lambda: LLM.generate(None, prompt_token_ids=[[5]]),
            "generate: unknown option 'prompt_token",
        ),
        (lambda: LLM.generate(None, "x", sampling_param=None), "did you mean sampling_params?"),
        (
            lambda: LLM.chat(None, [], lora_request=1),
            "chat: unknown option 'lora_request'; adapters",
        ),
    ],
)
def test_other_constructors_explain_unknown_names_too(make, said):
    with pytest.raises(TypeError) as refused:
        make()
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"w_gpu_percent": 20}, "policy: unknown key 'w_gpu_percent'; use weights="),
        ({"gpu_batchsize": 8}, "did you mean gpu_batch_size?"),
        ({"weights": {"ssd": 1}}, "policy: weights: unknown key 'ssd'; use disk"),
    ],
)
def test_keys_of_a_policy_file_are_explained(values, said):
    with pytest.raises(ValueError) as refused:
        Policy.from_dict(values)
    assert said in str(refused.value)


WRONG = {
    "model": ["", None, 5],
    "policy": [{"gpu_batch_size": 8}, 8],
    "dtype": ["float8", None, "FP16"],
    "device": [None],
    "gpu_memory": [0.9, "lots", -1, True, "0.9 of it"],
    "cpu_memory": [1.5],
    "disk_memory": ["-5GiB"],
    "offload_dir": [5],
    "pipeline_parallel_size": [0, -1, 1.5, True, "two", None],
    "use_ray": ["False", None, 0],
    "address": [6379],
    "transport": ["tcp", None],
    "max_restarts": [-1, "3", 1.5, True, None],
    "stall_timeout": [0, -1.0, "300", None, True],
    "restart_timeout": [0, -1, "120", True],
    "faults": [3],
    "seed": [None, 1.5, "x", True],
    "executor": ["parallel"],
    "run_wrapper": ["benchmarks.emulation:EmulatedRun", 1.0],
    "hardware": ["t4", 5],
    "trace": ["yes", "trace.json"],
    "threads": [0, "2", True, 1.5],
    "wait": [-1, "10", float("nan"), True],
    "max_model_len": [0, -1, "2048", 1.5, True],
    "on_progress": [None, True],
    "plan_for": [5, True],
    "max_latency": [0, -1.0, "60", True, float("inf")],
    "dry_run": ["yes", None, 1],
    "enable_prefix_caching": [None, "yes", 1],
    "load_format": ["safetensors", None],
    "weight_bits": [3, 16, "4", 4.0],
    "embedding_bits": [2],
    "cache_bits": [5],
    "attention_sparsity": [0, 1.5, True, "0.1"],
}  # fmt: skip


def test_every_option_is_checked_and_has_a_good_default(text_model):
    assert set(WRONG) == set(OPTIONS)
    defaults = {name: it.default for name, it in OPTIONS.items()} | {"model": text_model}
    check_values(defaults, CHECKS)
    good = {"gpu_memory": "16GiB", "cpu_memory": np.int64(2**30), "pipeline_parallel_size": "auto",
            "policy": Path("x.yaml"), "offload_dir": "there", "device": "cuda:12",
            "hardware": "measured", "seed": np.int32(3)}  # fmt: skip
    check_values(defaults | good, CHECKS)


@pytest.mark.parametrize("name, value", [(it, value) for it in WRONG for value in WRONG[it]])
def test_a_wrong_value_is_named_with_what_it_may_be(text_model, name, value):
    options = {"model": text_model, "use_ray": False} | {name: value}
    with pytest.raises(ValueError) as refused:
        LLM(**options)
    said = str(refused.value)
    assert f"{name} is {value!r}; it " in said and "\n" not in said


@pytest.mark.parametrize(
    "make, said",
    [
        (
            lambda: Policy(weights={"gpu": 1.0}),
            "policy: weights is {'gpu': 1.0}; it must be Placement",
        ),
        (lambda: Policy(cpu_attention=True), "cpu_attention is True"),
        (lambda: Policy(cpu_attention="0.5"), "cpu_attention is '0.5'"),
        (lambda: Policy(weight_bits=True), "weight_bits is True"),
        (lambda: Placement(True), "has a fraction outside 0 to 1"),
        (lambda: Placement(0.5, "0.5"), "has a fraction outside 0 to 1"),
        (lambda: Faults(max_restarts="3"), "max_restarts is '3'"),
        (lambda: Faults(stall_seconds="3"), "stall_seconds is '3'"),
        (lambda: Faults(restart_seconds=0), "restart_seconds is 0"),
    ],
)
def test_wrong_values_of_policies_are_named(make, said):
    with pytest.raises(ValueError) as refused:
        make()
    assert said in str(refused.value)
    assert set(LOSSY) <= set(OPTIONS)


# Whole numbers whose values are refused where they are used, in a sentence of their own.
CHECKED_LATER = {
    "seed", "max_tokens", "weight_bits", "embedding_bits", "cache_bits", "bits", "max_restarts",
    "threads", "max_model_len",
}  # fmt: skip


def whole_numbers(command) -> dict[str, int | None]:
    """{option: its least value, if it has one} of those that take an integer."""
    found = {}
    for option in command.params:
        kind = getattr(option, "type", option)  # older typer has click's types
        taken = getattr(getattr(option, "type_descriptor", None), "annotation", None)
        if taken is int or getattr(kind, "name", "").startswith("integer"):
            found[option.name] = getattr(kind, "min", None)
    return found


def test_no_whole_number_of_a_command_is_without_a_least_value():
    found = {
        name: whole_numbers(command)
        for name, command in commands(typer.main.get_command(app), "flexgen-ray")
    }
    assert found["flexgen-ray eval cloze"]["max_texts"] == 1
    for name, options in found.items():
        if name != "flexgen-ray plan":  # which checks them together
            unchecked = {option for option, least in options.items() if least is None}
            assert unchecked <= CHECKED_LATER, name


@pytest.mark.parametrize("command", ["perplexity --max-tokens", "cloze --max-texts"])
def test_a_negative_number_of_texts_is_refused(run_here, text_model, tmp_path, command):
    (tmp_path / "data").write_text('{"text": "one two"}\n' * 3)
    kind, option = command.split()
    refused = run_here("eval", kind, "--model", text_model, "--data", tmp_path / "data", option, -1)
    assert refused.returncode and f"Invalid value for '{option}'" in refused.stderr


@pytest.mark.parametrize("stages", ["two", "0", "-1", "1.5", ""])
def test_a_wrong_number_of_stages_is_refused_in_the_option_s_name(run_here, text_model, stages):
    job = ("--model", text_model, "--input", "in.jsonl", "--output", "out.jsonl", "--no-use-ray")
    refused = run_here("generate", *job, "--pipeline-parallel-size", stages)
    assert refused.returncode and "--pipeline-parallel-size" in refused.stderr
    assert f"{stages!r} is neither auto nor a number from 1 up" in refused.stderr
