"""Rooflines agree with those that were computed apart, and nothing that is planned exceeds them."""

from __future__ import annotations

import pytest

from flexgen_ray.config import Budget, HardwareSpec, Policy, Workload
from flexgen_ray.cost.experts import touched_experts
from flexgen_ray.cost.roofline import FLEXGEN_ROWS, Roofline
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.comparison import HardwareNode, devices_of, rooflines
from flexgen_ray.planner.pipeline_plan import PlannedJob
from flexgen_ray.planner.search import Planner
from flexgen_ray.schedule.zigzag import StageLayers

GB, TFLOP = 1e9, 1e12
USABLE = 0.9  # of memory


def machine(link, memory, tflops, attention, host, gpu_gb, cpu_gb):
    disk = GB  # not used: the budget has none
    spec = HardwareSpec(
        link * GB, link * GB, disk, disk, host * GB, attention * GB, tflops * TFLOP, memory * GB
    )
    return spec, Budget(int(USABLE * gpu_gb * GB), int(USABLE * cpu_gb * GB), 0)


MACHINES = {
    "T4": machine(10, 256, 21, 33, 60, 14.3, 192),
    "4090": machine(20, 900, 150, 33, 60, 24, 128),
    "H100": machine(45, 3000, 600, 33, 79, 85, 134),
    "H100, 1 TB": machine(45, 3000, 600, 120, 240, 85, 1000),
}
LINK_OR_HOST, PRODUCTS = {"h2d", "host_attention"}, {"flops"}
# Tokens/s of FlexGen's schedule and of the best one for prompts of 512 tokens and answers of 256,
# computed by hand, where each of FlexGen's batches reads all experts; and what binds the best.
TABLE = [
    ("mixtral-8x7b", None, "T4", 62, 129, LINK_OR_HOST),
    ("mixtral-8x7b", None, "4090", 106, 132, LINK_OR_HOST),
    ("mixtral-8x7b", None, "H100", 489, 736, LINK_OR_HOST),
    ("mixtral-8x7b", None, "H100, 1 TB", 702, 1933, LINK_OR_HOST),
    ("qwen3-30b-a3b", None, "T4", 102, 392, LINK_OR_HOST),
    ("qwen3-30b-a3b", None, "4090", 276, 539, LINK_OR_HOST),
    ("qwen3-235b-a22b", 4, "T4", 26, 34, LINK_OR_HOST),
    ("qwen3-235b-a22b", 4, "H100", 236, 315, LINK_OR_HOST),
    ("qwen3-235b-a22b", 4, "H100, 1 TB", 452, 1175, LINK_OR_HOST),
    ("llama-3-70b", None, "T4", 11, 15, LINK_OR_HOST),
    ("llama-3-70b", 4, "T4", 38, 50, PRODUCTS),
    ("llama-3-70b", 4, "4090", 123, 210, LINK_OR_HOST),
    ("llama-3-70b", None, "H100", 124, 162, LINK_OR_HOST),
    ("llama-3-70b", None, "H100, 1 TB", 303, 692, LINK_OR_HOST),
]


@pytest.mark.parametrize(("model", "bits", "name", "flexgen", "best", "bound"), TABLE)
def test_rooflines_are_those_of_a_table_that_was_computed_apart(
    model, bits, name, flexgen, best, bound
):
    config, (spec, budget) = shape_config(model), MACHINES[name]
    stage, policy = StageLayers.whole(config.num_layers), Policy(1, weight_bits=bits)
    plan = StagePlan(config, stage, policy, Workload(1, 512, 768), "bfloat16")
    line = Roofline(plan, spec, budget, 512, 256)
    assert line.best.tokens_per_s == pytest.approx(best, rel=0.15)
    assert line.best.bound in bound
    read = 1.0
    if config.num_experts:
        read = touched_experts(config, FLEXGEN_ROWS) / config.num_experts
    assert line.flexgen.tokens_per_s * read == pytest.approx(flexgen, rel=0.15)
    assert line.flexgen.tokens_per_s <= line.best.tokens_per_s


@pytest.mark.parametrize(
    ("model", "name", "memory"),
    [("mixtral-8x7b", "t4", None), ("opt-6.7b", "rtx3090", "32GiB"), ("olmoe-1b-7b", "h200", None)],
    ids=["streamed", "dense", "resident"],
)
def test_no_plan_exceeds_its_roofline(model, name, memory):
    config, node = shape_config(model), HardwareNode(Hardware.preset(name))
    devices = devices_of([node.with_memory(None, memory, None)], config, "float16")
    planner = Planner(config, devices, PlannedJob.uniform(4000, 256, 64), "float16")
    shapes = [Policy(4, 1, 512), Policy(64, 2, 512), Policy(128, 8, 2048)]
    plans = list(filter(None, map(planner.plan, shapes)))
    for plan in plans:
        best, flexgen = rooflines(devices, plan)
        assert plan.tokens_per_s <= best.tokens_per_s
        assert flexgen.tokens_per_s <= best.tokens_per_s
    # Issuing binds what is resident, which no roofline counts.
    share = max(plan.tokens_per_s for plan in plans) / best.tokens_per_s
    assert share > (0.05 if model == "olmoe-1b-7b" else 0.3)


def test_memory_that_holds_no_row_has_a_roof_of_nothing():
    config, (spec, _) = shape_config("mixtral-8x7b"), MACHINES["T4"]
    stage = StageLayers.whole(config.num_layers)
    plan = StagePlan(config, stage, Policy(1), Workload(1, 512, 768), "bfloat16")
    small = Roofline(plan, spec, Budget(10**10, 10**10, 0), 512, 256).best
    assert small.tokens_per_s == 0 and small.rows == 0
    with_disk = Roofline(plan, spec, Budget(10**10, 10**10, 10**12), 512, 256).best
    assert with_disk.bound == "disk_read" and with_disk.rows > 0
