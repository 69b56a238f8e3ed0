"""What it takes to draw tokens is in the cost model, the plan and the report."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.config import Budget, HardwareSpec
from flexgen_ray.cost.ops import sampling_share
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.choose import planned_job
from flexgen_ray.planner.grid import SearchSpace
from flexgen_ray.planner.pipeline_plan import ModelRates, PlannedJob, StageDevice
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.request import Request

GREEDY = SamplingParams(5, 0.0)
FREE = HardwareSpec(*[1e18] * 8)
GIB = 2**30
FEW_SHAPES = SearchSpace(batch_sizes=(16, 64), batches=(1, 2, 4), tiles=(512,))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("params", "shares"),
    [
        ([GREEDY] * 3, 0.0),
        ([SamplingParams(5)] * 3, 3.0),
        ([GREEDY, SamplingParams(5, top_k=4), SamplingParams(5, 0.7)], 1.0 + sampling_share(1, 4)),
    ],
)
def test_modelled_seconds_are_those_of_the_tokens_that_were_drawn(
    tiny_models, params, shares, stages
):
    folder, _ = tiny_models["llama"]
    rates = replace(FREE, sampled_values_per_s=1000.0)
    options = {"hardware": rates, "pipeline_parallel_size": stages}
    with LLM(folder, policy=Policy(2, 2), use_ray=False, dtype="float32", **options) as llm:
        llm.generate(tiny.prompts(3, 20, seed=3), params)
        measured = llm.report.stages[-1].measured
    expected = 5 * shares * tiny.VOCABULARY / 1000
    assert measured.modelled_resources.get("sampling", 0.0) == pytest.approx(expected)
    assert measured.modelled_lanes.get("device", 0.0) == pytest.approx(expected, abs=1e-6)
    assert 0 < measured.sampling <= measured.busy["device"]


def test_a_plan_counts_what_its_job_draws():
    config, machine = shape_config("opt-1.3b"), Hardware.preset("cpu")
    device = StageDevice(ModelRates(machine, config, "float32"), Budget(8 * GIB, 8 * GIB, 0))
    prompt = list(range(64))

    def seconds(params: SamplingParams) -> tuple[float, float]:
        job = planned_job([Request(index, prompt, params) for index in range(256)])
        plan = find_best_plan(Planner(config, (device,), job, "float32", FEW_SHAPES))
        visits = sum(plan.visits.values()) * plan.num_blocks
        return plan.block_seconds, plan.block_size * config.vocab_size * visits

    greedy, _ = seconds(SamplingParams(32, 0.0))
    drawn, logits = seconds(SamplingParams(32, 1.0))
    some, _ = seconds(SamplingParams(32, 1.0, top_k=20))
    assert greedy < some < drawn
    assert drawn >= logits / device.rates(8, 64).sampled_values_per_s
    assert planned_job([Request(0, prompt, GREEDY)]) == PlannedJob.uniform(1, 64, 5)


def test_the_report_names_sampling_where_it_takes_a_large_part(tiny_models):
    folder, _ = tiny_models["llama"]
    with LLM(folder, policy=Policy(4, 1), use_ray=False, dtype="float32") as llm:
        llm.generate(tiny.prompts(4, 20, seed=3), GREEDY)
        (stage,) = llm.report.stages
    for sampling in (1.0, 5.0):
        measured = replace(stage.measured, busy={"device": 10.0, "host": 1.0}, sampling=sampling)
        told = [it for it in replace(stage, measured=measured).lines() if "sampling took" in it]
        assert len(told) == (sampling == 5.0)
        assert all("took 5.0 s of the CPU's 10.0 s" in line for line in told)
