"""The benchmark of mixed lengths: its memory, its figures, and the run that any checkout can do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from bench_results import benchmark
from documents import ROOT
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import mixed_lengths, mixed_lengths_run
from benchmarks.mixed_lengths import (
    EMULATED_T4,
    FROM_DISK,
    IN_MEMORY,
    budget_of,
    figures,
    fixed_slots,
)
from flexgen_ray.cli.bench.lengths import conversations, draw, scale
from flexgen_ray.config import Budget, Policy, Workload
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.fill import fill_tiers
from flexgen_ray.schedule.zigzag import StageLayers

LENGTHS = scale(draw(conversations(), 128), 512)


@given(
    st.sampled_from(["opt-125m", "llama-3-8b", "gemma-3-1b", "opt-30b"]),
    st.integers(1, 64),
    st.sampled_from([IN_MEMORY, FROM_DISK, EMULATED_T4]),
)
def test_memory_is_enough_for_the_slots_and_not_for_twice_as_many(shape, rows, where):
    slots = fixed_slots(shape_config(shape), LENGTHS, rows, where == EMULATED_T4)
    twice = replace(slots, rows=2 * rows)
    assert twice.cache == 2 * slots.cache
    budget = sum(budget_of(slots, where).values())
    assert budget >= slots.weights + slots.cache + slots.device_work + slots.host_work
    more = sum(budget_of(twice, where).values()) - budget
    assert more >= slots.cache


@pytest.mark.parametrize("rows", [4, 16, 64])
@pytest.mark.parametrize("where", [IN_MEMORY, FROM_DISK])
def test_an_engine_fills_that_memory_with_no_fewer_rows(rows, where):
    with mixed_lengths.made_up_model("llama-90m") as (_, config):
        slots = fixed_slots(config, LENGTHS, rows, False)
    workload = Workload(len(LENGTHS), slots.longest_prompt, slots.longest)
    layers = StageLayers.whole(config.num_layers)
    plan = StagePlan(config, layers, Policy(), workload, "float32", stages_disk=False)
    (filled,) = fill_tiers([plan], [Budget(**budget_of(slots, where))])
    assert filled.policy.block_size >= rows and filled.policy.cache.disk == 0


def test_figures_count_what_was_asked_for_once():
    task = {"lengths": [[10, 4], [6, 2]]}
    run = {"seconds": 2.0, "passes": 4, "tokens": 6, "prompt_tokens": 17, "cache_tokens": 28.0,
           "used_bytes": {}, "policy": {}, "device": "any"}  # fmt: skip
    reached = figures(task, run)
    assert reached["useful_tokens_per_s"] == 3 and reached["useful_with_prompts_per_s"] == 11
    assert reached["recomputed_share"] == pytest.approx(1 / 22, abs=1e-4)
    assert reached["live_cache"] == pytest.approx((10 + 11 + 12 + 13 + 6 + 7) / (4 * 28), abs=1e-4)
    with pytest.raises(RuntimeError, match="5 tokens came, but 6 were asked for"):
        figures(task, run | {"tokens": 5})


def test_a_case_is_run_by_both_checkouts_in_turns(tmp_path, monkeypatch):
    """In this process: a process of its own would only import the package again."""
    done = []

    def run(checkout, task):
        done.append(checkout)
        ran = figures(task, mixed_lengths_run.measured(task, str(tmp_path)))
        return ran | {"cores_elsewhere": 0.0}

    monkeypatch.setattr(mixed_lengths, "run_once", run)
    result = benchmark(
        "mixed_lengths", "--other", tmp_path, "--lengths", "conversations", "--rows", 4,
        "--num-requests", 8, "--longest", 64, "--repeats", 2,
    )  # fmt: skip
    assert done == [ROOT, tmp_path] * 2 and result["emulated"] is False
    case = result["cases"]["conversations, 4 slots"]
    assert case["num_requests"] == 8 and case["fixed_slots"]["longest"] == 64
    rates = {each: sorted(it["useful_tokens_per_s"] for it in case["runs"][each])[0]
             for each in ("this", "other")}  # fmt: skip
    assert case["ratio"] == pytest.approx(rates["this"] / rates["other"], rel=1e-3)
    for ran in case["runs"]["this"]:
        assert ran["recomputed_share"] == 0 and 0 < ran["live_cache"] <= 1


@pytest.mark.slow
def test_opt_30b_is_planned_and_emulated(monkeypatch):
    result = benchmark(
        "mixed_lengths", "--emulated", "--lengths", "conversations", "--rows", 4,
        "--num-requests", 8, "--longest", 64, "--cell-ms", 0.5,
    )  # fmt: skip
    (ran,) = result["cases"]["conversations, 4 slots"]["runs"]["this"]
    assert result["emulated"] is True and ran["time_scale"] < 1 and ran["recomputed_share"] == 0


def test_a_run_by_another_checkout_than_asked_for_is_refused(tmp_path):
    """The message comes before torch is imported."""
    command = [sys.executable, "-P", str(ROOT / "benchmarks/mixed_lengths_run.py")]
    text = f'{{"checkout": "{tmp_path}", "is_emulated": false}}'
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1 and f"not of {tmp_path}" in done.stderr


def test_one_long_prompt_is_run_in_turns_with_none_and_the_ratio_is_of_seconds(monkeypatch):
    done: list[int] = []

    def run(checkout, task):
        done.append(len(task["lengths"]))
        assert sum(prompt for prompt, _ in task["lengths"]) == 2560 + 1500 * (done[-1] == 65)
        return {"seconds": 2.0 if done[-1] == 64 else 3.0 + len(done), "device": "any",
                "useful_tokens_per_s": 10 - len(done)}  # fmt: skip

    monkeypatch.setattr(mixed_lengths, "run_once", run)
    result = benchmark("one_long", "--repeats", 3)
    assert done == [64, 65] * 3
    assert result["ratio"] == {"this": 3.5}
