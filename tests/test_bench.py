"""Benchmarks end in one JSON line that says what was measured, on what, and what binds."""

from __future__ import annotations

import json
import re
import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest
from bench_results import bench, benchmark
from typer.testing import CliRunner

from benchmarks import attention as bench_attention
from benchmarks import choice, few_shot, gate
from benchmarks import paper_machines as t4
from flexgen_ray.cli.bench import runs as bench_runs
from flexgen_ray.cli.main import app
from flexgen_ray.config import Policy
from flexgen_ray.layout import plan as plan_module

ROOT = Path(__file__).parents[1]
FIELDS = {
    "prefill_s", "decode_s", "total_s", "generated_tokens_per_s", "decode_tokens_per_s",
    "bound_tokens_per_s", "fraction_of_bound", "binding_lane", "lanes", "peak_bytes", "hardware",
    "versions", "policy", "command", "date",
}  # fmt: skip
POLICY = """
gpu_batch_size: 2
num_gpu_batches: 2
weights: {gpu: 0.4, cpu: 0.3, disk: 0.3}
cache: {gpu: 0.4, cpu: 0.3, disk: 0.3}
cpu_attention: 0.5
"""


def test_every_benchmark_says_what_it_claims_what_is_good_and_which_command_made_its_file(capsys):
    runpy.run_module("benchmarks", run_name="__main__")
    listed = re.findall(r"^python -m benchmarks\.(\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert len(listed) == 22 and "__main__" not in listed
    for name in listed:
        about = " ".join((import_module(f"benchmarks.{name}").__doc__ or "").split())
        assert re.search(r"Claims?\b", about) and "Good: " in about, name
        files = re.findall(r"(docs/results/\S+\.json): python -m benchmarks\.(\w+)", about)
        assert files and all((ROOT / file).is_file() and made == name for file, made in files), name


@pytest.fixture
def policy_file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return path


@pytest.mark.parametrize("executor", ["serial", "async"])
def test_throughput_counts_every_token_and_stays_within_its_bound(
    tiny_models, tmp_path, policy_file, executor, monkeypatch
):
    """A given policy needs no solver. The warm-up counts for nothing."""
    monkeypatch.setitem(sys.modules, "highspy", None)
    folder, _ = tiny_models["llama"]
    result = bench(
        "throughput", "--model", folder, "--prompt-len", 24, "--max-tokens", 6, "--dtype",
        "float32", "--device", "cpu", "--policy", policy_file, "--offload-dir", tmp_path / "off",
        "--cpu-memory", "64MiB", "--gpu-memory", "64MiB", "--disk-memory", "64MiB", "--executor",
        executor, "--json", tmp_path / "result.json", "--trace", tmp_path / "trace.json",
    )  # fmt: skip
    assert set(result) >= FIELDS
    assert json.loads((tmp_path / "result.json").read_text()) == result
    policy = Policy.from_yaml(policy_file)
    assert result["num_prompts"] == policy.block_size
    assert result["warm_up"] == {"prompts": policy.block_size, "prompt_len": 24, "max_tokens": 2}
    generated = result["generated_tokens_per_s"] * result["total_s"]
    assert generated == pytest.approx(policy.block_size * 6, rel=0.01)
    decoded = result["decode_tokens_per_s"] * result["decode_s"]
    assert decoded == pytest.approx(policy.block_size * 5, rel=0.01)
    assert 0 < result["fraction_of_bound"] <= 1
    assert result["binding_lane"] in result["bound_s"]
    assert all(0 < fraction <= 1 for fraction in result["lanes"].values())
    assert all(result["peak_bytes"][tier] <= 64 * 2**20 for tier in ("gpu", "cpu", "disk"))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_built_in_shape_needs_no_files(tmp_path):
    result = bench(
        "throughput", "--model", "opt-125m", "--prompt-len", 4, "--max-tokens", 2, "--num-prompts",
        2, "--device", "cpu", "--offload-dir", tmp_path,
    )  # fmt: skip
    assert result["model"] == "opt-125m" and result["fraction_of_bound"] > 0


def test_an_unknown_shape_names_the_known_ones():
    done = CliRunner().invoke(app, ["bench", "throughput", "--model", "opt-7b"])
    assert isinstance(done.exception, ValueError) and "opt-6.7b" in str(done.exception)


def test_emulated_lanes_say_so_and_never_beat_their_model():
    result = benchmark("lanes", "--layers", 2, "--batches", 2, "--passes", 2, "--op-ms", 0.2)
    assert result["emulated"] is True
    assert len(result["cases"]) == 6
    assert all(case["ratio"] >= 1 for case in result["cases"].values())


def test_a_run_and_its_simulation_are_compared_case_by_case():
    result = benchmark("simulate", "--layers", 2, "--batches", 2, "--passes", 2, "--op-ms", 0.2)
    assert result["emulated"] is True
    assert len(result["cases"]) == 6
    for case in result["cases"].values():
        assert case["ratio"] == pytest.approx(case["measured_s"] / case["simulated_s"], rel=0.01)
        assert case["wall_ratio"] == pytest.approx(case["wall_s"] / case["simulated_s"], rel=0.01)


def test_prefixes_are_counted_with_sharing_and_without(monkeypatch):
    # Whatever else this machine does meanwhile.
    monkeypatch.setattr(bench_runs, "name_disturbance", lambda cores: [])
    monkeypatch.setattr(plan_module, "FOLDED_ROWS", 1)
    work = ("--groups", 2, "--rows", 3, "--prompt-len", 150, "--max-tokens", 4)
    result = benchmark("prefixes", "--cases", "resident,nothing shared", *work)
    case, other = (result["cases"][name] for name in ("resident", "nothing shared"))
    # 0.8 of 150 tokens are seven pages, which two of three rows need not compute.
    saved = 2 * 2 * 7 * 16
    assert case["saved_prompt_tokens"] == saved and case["share_of_possible_saving"] == 1
    assert case["runs"]["without"][0]["prompt_tokens"] == 6 * 150
    assert case["equal_answers"] == case["requests"] == 6
    with_it, without = (case["runs"][name][0]["cache_bytes_a_pass"] for name in case["runs"])
    token = 2 * 4 * 64 * 4 * 8  # bytes: keys and values of 4 heads of 64 numbers in 8 layers
    assert without == pytest.approx(6 * 152 * token, rel=0.01)
    assert without - with_it == pytest.approx(saved * token, rel=0.01)
    assert other["saved_prompt_tokens"] == 0 and other["cache_bytes_ratio"] == 1
    assert 0 < case["ratio"] and 0 < other["ratio"]


def test_few_shot_jobs_are_confirmed_by_transformers(text_model, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_runs, "name_disturbance", lambda cores: [])
    monkeypatch.setattr(few_shot, "GSM8K_EXAMPLES", 4)
    lines = [json.dumps({"question": f"{i}+{i}", "answer": f"{2 * i}"}) for i in range(7)]
    (tmp_path / "gsm8k_test.jsonl").write_text("\n".join(lines))
    result = benchmark(
        "few_shot", "--data", tmp_path, "--model", text_model, "--jobs", "gsm8k", "--questions", 3
    )
    case = result["jobs"]["gsm8k"]
    assert case["equal_answers"] == case["confirmed"] == case["requests"] == 3
    assert case["share_of_possible_saving"] == 1 and case["saved_prompt_tokens"] >= 2 * 4 * 16


def test_issuing_is_measured_in_microseconds_an_op():
    result = benchmark("issue", "--layers", 2, "--batches", 2, "--repeats", 3)
    assert result["median_us_per_op"] in result["us_per_op"]


def test_the_planners_choice_is_run_beside_every_policy_of_the_grid_that_fits(monkeypatch):
    # Whatever else this machine does, and however far the prediction is; see tests/test_gate.py.
    monkeypatch.setattr(gate, "mark", lambda doubts: {})
    monkeypatch.setattr(gate, "ATTEMPTS", 1)
    monkeypatch.setattr(choice, "LAYERS", 2)
    monkeypatch.setattr(choice, "REQUESTS", 16)
    monkeypatch.setattr(choice, "WORKLOADS", {"short": (8, 6)})
    monkeypatch.setattr(choice, "SHAPES", ((2, 2), (8192, 16)))
    result = benchmark("choice", "--workloads", "short", "--cell-ms", 3)
    found = result["workloads"]["short"]
    runs = found["grid"]
    assert len(runs) == len(choice.WEIGHTS) * len(choice.CACHES)
    assert {it["policy"]["gpu_batch_size"] for it in runs} == {2}
    rates = [it["measured_tokens_per_s"] for it in runs]
    assert found["best_to_worst_of_grid"] == pytest.approx(max(rates) / min(rates), abs=1e-3)
    chosen = found["chosen"]["measured_tokens_per_s"]
    assert found["chosen_to_best_of_grid"] == pytest.approx(chosen / max(rates), abs=1e-3)


@pytest.mark.slow
def test_unlike_gpus_are_split_and_run(monkeypatch):
    monkeypatch.setattr(gate, "ATTEMPTS", 1)
    monkeypatch.setattr(t4, "PROMPT_LEN", 8)
    monkeypatch.setattr(t4, "MAX_TOKENS", 12)
    result = benchmark(
        "unequal", "--clusters", "t4,rtx4090", "--model", "opt-125m", "--requests", 16,
        "--step", 4,
    )  # fmt: skip
    found = result["clusters"]["t4,rtx4090"]
    assert found["best_of_enumeration"]["splits"] == 2
    for which in ("chosen", "equal"):
        assert sum(found[which]["layers"]) == 12
        assert 0 < found[which]["decode_tokens_per_s"]
    assert found["equal"]["layers"] == [6, 6]


@pytest.mark.slow
def test_scaling_runs_what_it_says_and_draws_it(monkeypatch, tmp_path):
    """With short prompts and answers, so that it takes a minute."""
    monkeypatch.setattr(gate, "ATTEMPTS", 1)
    monkeypatch.setattr(t4, "PROMPT_LEN", 8)
    monkeypatch.setattr(t4, "MAX_TOKENS", 12)
    picture = tmp_path / "scaling.png"
    result = benchmark(
        "scaling", "--models", "opt-125m", "--stages", "1,2", "--extra-blocks", "0",
        "--sequences", 64, "--plot", picture,
    )  # fmt: skip
    runs = result["models"]["opt-125m"]["stages"]
    for run in runs.values():
        assert 0 < max(run["busy_share_of_stages"]) <= 1.05  # of a window that begins late
        assert 0 < run["decode_tokens_per_s"] <= 1.02 * run["predicted_decode_tokens_per_s"]
    assert result["emulated"] and result["believable"]["published"] == 11.52
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_attention_compares_packed_and_sparse_caches_with_the_plain_one(monkeypatch):
    for name, only in (("DTYPES", "float16"), ("HEAD_DIMS", 64), ("GROUPS", 2)):
        monkeypatch.setattr(bench_attention, name, (only,))
    result = benchmark(
        "attention", "--megabytes", 2, "--context", 64, "--seconds", 0, "--threads", 1,
        "--bits", 4, "--sparsity", 0.25,
    )  # fmt: skip
    (row,) = result["results"]
    assert row["int4_of_plain_bytes"] == round(36 / 128, 3)
    assert row["sparse_of_plain_bytes"] == (1 + 0.25) / 2
    assert row["int4_sparse_of_plain_bytes"] == round(36 / 128 * (1 + 0.25) / 2, 3)
    for name in ("int4", "sparse", "int4_sparse"):
        assert 0 < row[f"{name}_rows_per_s"] and 0 < row[f"{name}_of_plain_rows"]


def test_loading_compares_bytes_and_seconds_of_three_ways(tiny_models, tmp_path):
    folder, _ = tiny_models["llama"]
    result = benchmark("loading", "--model", folder, "--rounds", 2, "--json", tmp_path / "it.json")
    assert json.loads((tmp_path / "it.json").read_text()) == result
    plain, while_loading, before = result["runs"]
    size = (folder / "model.safetensors").stat().st_size
    assert plain["bytes_on_disk"] == while_loading["bytes_on_disk"] == size
    assert before["bytes_on_disk"] < size
    assert before["bytes_in_memory"] == while_loading["bytes_in_memory"] < plain["bytes_in_memory"]
    for run in result["runs"]:
        assert len(run["each_s"]) == 2 and min(run["each_s"]) <= run["load_s"] <= max(run["each_s"])
    assert result["quantize_s"] > 0 and {"hardware", "versions", "date"} <= set(result)
