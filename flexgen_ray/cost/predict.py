"""How long a visit takes at least, by the amounts of all its ops: the bound that runs are held to.

A stand-in until a planner uses the same sums as constraints. Knows plans and rates; no clock.
"""

from __future__ import annotations

from collections import defaultdict

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.cost import CostModel
from flexgen_ray.cost.moves import Moves
from flexgen_ray.cost.placed_rows import Composition
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.scarce import seconds_alone, seconds_by_resource
from flexgen_ray.rows import Row, Rows
from flexgen_ray.schedule.ops import LANE
from flexgen_ray.schedule.zigzag import zigzag


def visit_seconds(plan: StagePlan, hardware: HardwareSpec, rows: Rows) -> dict[str, float]:
    """{lane or resource: seconds} of one visit of a stage whose batches all bring these rows."""
    model, composition = CostModel(plan), Composition(rows, plan.streamed_rows - 1)
    moves = Moves(plan, is_linked=not plan.stage.is_whole)
    lanes: dict[str, float] = defaultdict(float)
    resources: dict[str, float] = defaultdict(float)
    for op in zigzag(plan.stage, plan.policy.num_gpu_batches, range(1)):
        # Weights that are fetched for the next visit count there.
        if op.visit or not moves(op):
            continue
        seconds = seconds_by_resource(model.amounts(op, composition), hardware)
        if seconds:
            lanes[LANE[op.kind].worker.value] += seconds_alone(seconds)
        for resource, each in seconds.items():
            resources[resource.name.lower()] += each
    # The disk is a resource and a lane of the same name.
    return resources | {it: max(lanes[it], resources.get(it, 0.0)) for it in lanes}


def decoding(plan: StagePlan, position: int) -> Rows:
    """Every slot of a batch brings one token."""
    slots = range(plan.policy.gpu_batch_size)
    return Rows(tuple(Row(slot, position, 1, slot, True, False) for slot in slots), ())


def prefilling(plan: StagePlan) -> tuple[Rows, float]:
    """Prompts of as many slots as fit a pass, and how many such passes a batch takes."""
    longest = plan.workload.max_prompt_len
    count = max(1, min(plan.policy.gpu_batch_size, plan.cell_tokens // longest))
    rows = tuple(Row(slot, 0, longest, slot * longest, True, True) for slot in range(count))
    return Rows(rows, ()), plan.policy.gpu_batch_size / count
