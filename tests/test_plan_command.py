"""`flexgen-ray plan` and runs without a policy: plans that say what they rest on, and fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
from bench_results import bench
from engine_runs import assert_same

from flexgen_ray import LLM, Hardware, SamplingParams
from flexgen_ray.cli.plan import plan as command
from flexgen_ray.hardware.rates import LinkRates, MemorySizes
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.paths import find_config, hardware_file
from flexgen_ray.planner.comparison import HardwareNode, compare, devices_of, read_job, read_nodes
from flexgen_ray.planner.grid import SearchSpace
from flexgen_ray.planner.pipeline_plan import PlannedJob
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.reporting.plan_report import PlanReport
from flexgen_ray.reporting.wording import resource_name

FEW = SearchSpace(batch_sizes=(16,), batches=(4,), tiles=(512,), extra_blocks=(0,))


def plan(*options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "flexgen_ray", "plan", *map(str, options)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_a_plan_for_a_machine_one_does_not_own(tmp_path):
    """Printed, as JSON, and as a policy that a run would take."""
    policy, result = tmp_path / "policy.yaml", tmp_path / "plan.json"
    done = plan(
        "--model", "opt-125m", "--hardware", "t4", "--num-requests", 20, "--prompt-len", 128,
        "--max-tokens", 16, "--price-per-hour", 0.5, "--policy-out", policy, "--json", result,
        "--weight-bits", 4, "--cache-bits", 8, "--attention-sparsity", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    estimate, first, *rest = done.stdout.splitlines()
    assert estimate.startswith("fits, about ") and "first estimate" in estimate
    assert "fits, about" in first and "20 requests in" in first and "(predicted)" in first
    assert "e+" not in done.stdout and "$ per million generated tokens" in done.stdout
    assert "everything fits the GPUs: a resident engine (such as vLLM)" in done.stdout
    assert any(line.startswith("sizes: weights ") and "per token" in line for line in rest)
    assert "HiGHS" not in done.stdout
    found = json.loads(result.read_text())
    assert found["fits"] and found["predicted"]
    machine = Hardware.preset("t4").budget
    for tier, nbytes in found["bytes"].items():
        assert nbytes <= getattr(machine, tier)
    (stage,) = found["stages"]
    given = StagePolicies.from_yaml(policy).policies[0]
    assert given.weights.fractions == tuple(stage["policy"]["weights"].values())
    assert given.gpu_batch_size == stage["policy"]["gpu_batch_size"]
    assert (given.weight_bits, given.cache_bits, given.attention_sparsity) == (4, 8, 0.5)
    names = {it["name"] for it in found["alternatives"]}
    assert names == {"everything on the GPUs", "the CPU alone"}
    assert found["tokens_per_s"] > 0 and resource_name(found["binding_lane"]) in done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hardware": ["t5"]}, "presets are a100-80"),
        ({"hardware": ["rtx409"]}, "did you mean rtx4090?"),
        ({"hardware": ["t4"], "model": "opt-6.7"}, "did you mean opt-6.7b?"),
        ({"hardware": ["t4"], "max_latency": 0.0}, "--max-latency is 0"),
        ({"hardware": ["t4"], "price_per_hour": -1.0}, "--price-per-hour is -1"),
        ({"hardware": ["t4"], "gpu_memory": "0"}, "--gpu-memory is 0"),
        ({"hardware": ["t4"], "disk_memory": "much"}, "--disk-memory: 'much' is not a size"),
        ({"hardware": ["t4"], "dtype": "float8"}, "dtype is 'float8'"),
        ({"hardware": ["t4"], "prompt_len": 4000}, "the model's context is 2048"),
        (
            {"hardware": ["t4", "h100"], "pipeline_parallel_size": 3},
            "--pipeline-parallel-size 3, but 2 machines",
        ),
        (
            {"hardware": ["t4"], "pipeline_parallel_size": 10**6},
            "--pipeline-parallel-size is 1000000; it must be 1 to 1024",
        ),
        ({"hardware": ["t4"], "workload": Path("/nowhere.csv")}, "/nowhere.csv"),
        ({"hardware": ["t4"], "shared_prefix": 600}, "600 tokens of a prompt of 512"),
        ({"hardware": ["t4"], "shared_prefix": 15}, "at least 16 must be"),
        ({"hardware": ["t4"], "shared_prefix": 64, "prefix_groups": 501}, "in 501 groups"),
        ({"hardware": ["t4"], "nodes": Path("/nowhere.yaml")}, "/nowhere.yaml"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(options, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        command(**{"model": "opt-6.7b"} | options)


def test_a_plan_says_what_it_assumes_of_prompts_that_share():
    (config, machine), job = a_third(), PlannedJob.uniform(60, 1000, 8, shared=820, groups=4)
    comparison = compare(config, [machine], job, "float16", FEW)
    report = PlanReport("opt-125m", ["a machine"], comparison)
    text, found = "\n".join(report.lines()), report.as_dict()
    assert "4 groups of requests share the first 816 of 1,000 prompt tokens" in text
    assert re.search(r"every prompt computed whole: .* tokens/s, 0\.\d+ times the plan's", text)
    assert found["sharing"]["tokens"] == 4 * 816
    (whole,) = (it for it in found["alternatives"] if it["name"] == "every prompt computed whole")
    assert whole["tokens_per_s"] < found["tokens_per_s"]


def test_a_frontier_without_matplotlib_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr("flexgen_ray.cli.plan.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--frontier needs matplotlib: pip install"):
        command(model="opt-6.7b", hardware=["t4"], frontier=tmp_path / "f.png")


def test_a_plan_needs_no_torch_and_refuses_numbers_below_one():
    code = "import sys; from flexgen_ray.cli.main import main\n"
    code += "sys.argv[1:] = ['plan', '--model', 'opt-125m', '--hardware', 't4', *sys.argv[1:]]\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--num-requests", "3", "--dtype", "auto"],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert "fits, about" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
    for option in ("--num-requests", "--max-tokens"):
        assert plan("--model", "opt-125m", "--hardware", "t4", option, 0).returncode == 64


def test_memory_of_ones_own_replaces_the_presets():
    node = HardwareNode(Hardware.preset("t4"))
    given = node.with_memory("10GiB", None, "1GiB").hardware.budget
    assert abs(given.gpu - 10 * 2**30) <= 1 and abs(given.disk - 2**30) <= 1
    assert given.cpu == node.hardware.budget.cpu


def test_of_a_name_on_the_hub_only_the_config_is_fetched(monkeypatch, tmp_path):
    wanted = []

    def fetched(name, allow_patterns, ignore_patterns):
        wanted.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert find_config("someone/some-model") == tmp_path
    assert set(wanted) == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("requests", [1, 3, 20, 1000])
def test_a_job_takes_no_longer_than_whole_rounds_and_blocks_are_no_larger(requests):
    (config, machine), job = a_third(), PlannedJob.uniform(requests, 128, 16)
    found = find_best_plan(
        Planner(config, devices_of([machine], config, "float16"), job, "float16")
    )
    slots = found.num_blocks * found.block_size
    assert slots < requests + found.stages[0].policy.num_gpu_batches
    rounds = ceil(requests / slots)
    assert found.block_seconds <= found.job_seconds <= rounds * found.block_seconds * 1.01
    assert bool(found.kinds) == (rounds > 1)
    assert found.tokens_per_s <= requests * 16 / found.block_seconds * 1.0001


def a_third() -> tuple[ModelConfig, HardwareNode]:
    """Of OPT-30B's layers, and a machine with as much less memory than a T4's: what fits where and
    what binds is as it is for all of them, and is sooner told."""
    machine, sizes = Hardware.preset("t4"), Hardware.preset("t4").memory
    less = MemorySizes(sizes.gpu // 3, sizes.cpu // 3, sizes.disk // 3, sizes.share)
    return replace(shape_config("opt-30b"), num_layers=16), HardwareNode(
        replace(machine, memory=less)
    )


def test_two_machines_are_better_than_one_and_replicas_are_compared():
    (config, machine), job = a_third(), PlannedJob.uniform(1000, 128, 16)
    one = compare(config, [machine], job, "float16", FEW)
    two = compare(config, [machine, machine], job, "float16", FEW)
    assert two.plan.tokens_per_s > one.plan.tokens_per_s
    by_name = {it.name: it for it in two.alternatives}
    replicas = by_name["2 independent replicas"]
    assert replicas.tokens_per_s == pytest.approx(2 * one.plan.tokens_per_s, rel=0.02)
    assert by_name["everything on the GPUs"].tokens_per_s is None
    lines = PlanReport("opt-30b", ["t4", "t4"], two).lines()
    assert any("everything on the GPUs: not possible" in line for line in lines)
    assert not any("resident engine" in line for line in lines)
    upgrade = {it.name: it.tokens_per_s for it in one.upgrades}["one more such machine"]
    assert upgrade == pytest.approx(two.plan.tokens_per_s, rel=0.02)


def test_the_cpu_alone_is_compared_where_its_speed_is_known_and_wins_over_a_slow_link():
    (config, machine), job = a_third(), PlannedJob.uniform(1000, 128, 16)
    fast = machine.hardware
    slow = replace(fast, link=LinkRates(1e8, 1e8, 1e8, 1e8))
    told = {}
    for name, machine in {"fast": fast, "slow": slow}.items():
        found = compare(config, [HardwareNode(machine)], job, "float16", FEW)
        told[name] = {it.name: it.tokens_per_s for it in found.alternatives}["the CPU alone"]
        lines = PlanReport("opt-30b", [name], found).lines()
        (line,) = (it for it in lines if it.startswith("the CPU alone"))
        assert line.endswith("do that instead") == (name == "slow")
    assert told["fast"] == told["slow"]
    unknown = replace(fast, host=replace(fast.host, flops_per_s=None))
    others = compare(config, [HardwareNode(unknown)], job, "float16", FEW).alternatives
    assert "the CPU alone" not in {it.name for it in others}


def test_lengths_and_machines_are_read_from_files(tmp_path):
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023,100,10\n2023,300,20\n")
    job = read_job(lengths)
    assert (job.num_requests, job.prompt_len, job.max_seq_len) == (2, 300, 320)
    assert (job.mean_prompt_len, job.mean_tokens) == (200, 15)
    assert read_job(lengths, 7).num_requests == 7
    lengths.write_text("10,5\n10,zero\n")
    with pytest.raises(ValueError, match="lengths.csv, line 2"):
        read_job(lengths)
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("- {hardware: t4, count: 2}\n- {hardware: a100-80, gpus: 4}\n")
    assert [(it.hardware.name, it.gpus) for it in read_nodes(nodes)] == [
        ("t4", 1), ("t4", 1), ("a100-80", 4),
    ]  # fmt: skip
    for text in ("hardware: t4", "- {count: 2}", "- {hardware: t4, gpus: 0}", "- {hardwar: t4}"):
        nodes.write_text(text)
        with pytest.raises(ValueError, match="nodes.yaml: "):
            read_nodes(nodes)


@pytest.fixture
def calibrated():
    """This node, as if it had been measured."""
    path = hardware_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Hardware.preset("cpu").to_yaml())
    yield
    path.unlink()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_calibrated_machine_plans_its_runs_and_says_how_right_it_was(
    tiny_models, calibrated, stages
):
    folder, references = tiny_models["llama"]
    budget = {"gpu_memory": "1MiB", "cpu_memory": "2MiB", "disk_memory": "64MiB"}
    options = budget | {"use_ray": False, "pipeline_parallel_size": stages}
    with LLM(folder, dtype="float32", device="cpu", **options) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0)
        outputs = llm.generate([reference.prompt for reference in references], params)
        report = llm.report
    assert_same([output.outputs[0] for output in outputs], references)
    assert report.forecast is not None
    assert any("predicted" in line for line in report.lines())
    assert report.as_dict()["predicted_tokens_per_s"] > 0
    for stage in report.stages:
        for tier, parts in stage.used.items():
            assert sum(parts.values()) <= getattr(stage.budget, tier)


def test_a_benchmark_of_a_given_policy_has_the_prediction_too(tiny_models, calibrated, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("gpu_batch_size: 2")
    result = bench(
        "throughput", "--model", tiny_models["llama"][0], "--policy", policy, "--prompt-len", 8,
        "--max-tokens", 3, "--dtype", "float32", "--device", "cpu",
    )  # fmt: skip
    ratio = result["generated_tokens_per_s"] / result["predicted_tokens_per_s"]
    assert result["measured_to_predicted"] == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("policy", [None, "auto"])
def test_without_rates_nothing_is_predicted(tiny_models, policy):
    folder, references = tiny_models["opt"]
    with LLM(folder, policy=policy, dtype="float32", device="cpu", use_ray=False) as llm:
        llm.generate([references[0].prompt], SamplingParams(max_tokens=2))
        assert llm.report.forecast is None
