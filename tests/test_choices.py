"""The planner's choices on published machines are as good as slower searches found them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.comparison import HardwareNode, devices_of
from flexgen_ray.planner.pipeline_plan import PlannedJob, StageDevice
from flexgen_ray.planner.search import Planner, find_best_plan

# Tokens/s of the best plan that is known, every layer played: one machine, and four with a stage
# each; prompts of 512 tokens, answers of 32, float16. Issuing ops is free here, for what it takes
# changes whenever ops launch fewer kernels.
BEST = {
    ("t4", "opt-6.7b"): (68.04, 290.1),
    ("t4", "opt-30b"): (15.26, 63.92),
    ("t4", "opt-175b"): (0.5883, 4.967),
    ("t4", "llama-3-8b"): (79.81, 323.9),
    ("t4", "llama-3-70b"): (7.671, 30.58),
    ("rtx4090", "opt-6.7b"): (438.5, 712.3),
    ("rtx4090", "opt-30b"): (18.28, 182.7),
    ("rtx4090", "opt-175b"): (1.337, 5.989),
    ("rtx4090", "llama-3-8b"): (541.5, 848.6),
    ("rtx4090", "llama-3-70b"): (17.25, 118.2),
    ("h100", "opt-6.7b"): (2382, 7893),
    ("h100", "opt-30b"): (338.2, 1881),
    ("h100", "opt-175b"): (0.6408, 53.51),
    ("h100", "llama-3-8b"): (2726, 8892),
    ("h100", "llama-3-70b"): (115.4, 966.2),
    ("a100-80", "opt-6.7b"): (900.1, 3083),
    ("a100-80", "opt-30b"): (139.2, 645.7),
    ("a100-80", "opt-175b"): (1.115, 51.09),
    ("a100-80", "llama-3-8b"): (952.9, 3249),
    ("a100-80", "llama-3-70b"): (74.43, 354.9),
}
QUICK = [("t4", "opt-30b"), ("h100", "opt-30b")]


def free_to_issue(device: StageDevice) -> StageDevice:
    """The device, whose ops take nothing of the thread that issues them."""
    return replace(
        device,
        rates=lambda *rows: replace(device.rates(*rows), launch_seconds=0.0, issue_seconds=0.0),
    )


def chosen(machine: str, shape: str, stages: int) -> float:
    """Tokens/s of the choice, of which the first estimate is not far."""
    config, nodes = shape_config(shape), [HardwareNode(Hardware.preset(machine))] * stages
    devices = tuple(map(free_to_issue, devices_of(nodes, config, "float16")))
    job = PlannedJob.uniform(10**6, 512, 32)
    estimates: list[float] = []
    planner = Planner(config, devices, job, "float16")
    plan = find_best_plan(
        planner, lambda it: estimates.append(job.mean_tokens / it.seconds_per_sequence)
    )
    (estimate,) = estimates
    assert 0.5 * estimate < plan.tokens_per_s < 2 * estimate
    return plan.tokens_per_s


@pytest.mark.parametrize("case", QUICK, ids="-".join)
def test_a_choice_for_one_machine_is_as_good_as_the_best_known(case):
    assert chosen(*case, 1) >= 0.98 * BEST[case][0]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("case", BEST, ids="-".join)
def test_every_choice_is_as_good_as_the_best_known(case, stages):
    assert chosen(*case, stages) >= 0.98 * BEST[case][stages > 1]
