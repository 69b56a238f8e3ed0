"""Time that the ops of a visit take: by lane, by resource, and on one batch's way through a stage.

A visit of any number of layers and batches is made of the ops of one layer's first batch and of a
further one, of the layers at the model's ends, and of weights, which cross once. So amounts are
derived once for a stage's kind and shape, and take any machine's rates. Knows plans; no clock.

How long a visit takes at least, by the amounts of all its ops: the bound that runs are held to.

A stand-in until a planner uses the same sums as constraints. Knows plans and rates; no clock.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Amounts, seconds_alone, seconds_by_resource
from flexgen_ray.layout.active_ops import ActiveOps
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Composition, Row, Rows
from flexgen_ray.schedule.ops import OPS, Path
from flexgen_ray.schedule.zigzag import zigzag


def visit_seconds(plan: StagePlan, hardware: HardwareSpec, rows: Rows) -> dict[str, float]:
    """{lane or resource: seconds} of one visit of a stage whose batches all bring these rows."""
    model, composition = CostModel(plan), Composition(rows, plan.streamed_rows - 1)
    is_active = ActiveOps(plan, in_ring=not plan.stage.is_whole)
    lanes: dict[str, float] = defaultdict(float)
    resources: dict[str, float] = defaultdict(float)
    for op in zigzag(plan.stage, plan.policy.num_gpu_batches, range(1)):
        # Weights that are fetched for the next visit count there.
        if op.visit or not is_active(op):
            continue
        seconds = seconds_by_resource(model.amounts(op, composition), hardware)
        if seconds:
            lanes[op.lane.worker.value] += seconds_alone(seconds)
        for resource, each in seconds.items():
            resources[resource.name.lower()] += each
    # The disk is a resource and a lane of the same name.
    return resources | {it: max(lanes[it], resources.get(it, 0.0)) for it in lanes}


def decoding_rows(plan: StagePlan, position: int) -> Rows:
    """Every slot of a batch brings one token."""
    slots = range(plan.policy.gpu_batch_size)
    return Rows(tuple(Row(slot, position, 1, slot, True, False) for slot in slots), ())


def prefilling_rows(plan: StagePlan) -> tuple[Rows, float]:
    """Prompts of as many slots as fit a pass, and how many such passes a batch takes."""
    longest = plan.workload.max_prompt_len
    count = max(1, min(plan.policy.gpu_batch_size, plan.cell_tokens // longest))
    rows = tuple(Row(slot, 0, longest, slot * longest, True, True) for slot in range(count))
    return Rows(rows, ()), plan.policy.gpu_batch_size / count


PHASES = ("prefill", "decode")
Quantity = tuple[str, str]  # (phase, lane, resource or way): seconds; ("bytes", tier): bytes
# A batch's way through a stage: ops that wait for each other, where rows are attended on the device
# or on the host. Weights and caches come ahead of need, and what is written to disk is not awaited.
PATHS = ("path by the device", "path by the host")


@dataclass(frozen=True)
class VisitTerms:
    """Seconds of a lane, a resource or a way: of a visit of one batch, once and for each layer, and
    of each further batch."""

    fixed: float = 0.0
    per_layer: float = 0.0
    per_batch: float = 0.0
    per_layer_batch: float = 0.0


@lru_cache(maxsize=8192)
def visit_terms(
    plan: StagePlan, hardware: HardwareSpec, position: int
) -> dict[Quantity, VisitTerms]:
    """By (phase, lane, resource or way). plan: of one decoder layer and two batches."""
    found = {}
    for phase, ops in _visit_ops(plan, position).items():
        # By whether a further batch brings them, and whether each layer has them.
        resources, lanes, ways = _sums(), _sums(), _sums()
        for op in ops:
            taken = seconds_by_resource(op.amounts, hardware)
            alone, at = seconds_alone(taken), 2 * op.is_further + op.is_of_layer
            lanes[op.lane][at] += alone
            for resource, seconds in taken.items():
                resources[resource.name.lower()][at] += seconds
            for way in op.ways if not op.is_further else ():
                ways[way][at] += alone
        # The disk is a resource and a lane of the same name.
        longer = {it: max(lanes[it], resources.get(it, [0.0]), key=sum) for it in lanes}
        for name, each in (resources | longer | ways).items():
            found[phase, name] = VisitTerms(*each)
    return found


@dataclass(frozen=True)
class _VisitOp:
    """An op, whether each layer has it, and whether only a further batch brings it."""

    lane: str
    ways: tuple[str, ...]
    is_of_layer: bool
    is_further: bool
    amounts: Amounts


@lru_cache(maxsize=4096)
def _visit_ops(plan: StagePlan, position: int) -> dict[str, list[_VisitOp]]:
    """{phase: ops of a visit}, for any machine's rates."""
    is_active = ActiveOps(plan, in_ring=not plan.stage.is_whole)
    ops = [op for op in zigzag(plan.stage, 2, range(1)) if not op.visit and is_active(op)]
    model, found = CostModel(plan), {}
    for phase, rows in zip(
        PHASES, (prefilling_rows(plan)[0], decoding_rows(plan, position)), strict=True
    ):
        composition, its = Composition(rows, plan.streamed_rows - 1), []
        attends_on_host = phase == "decode" and plan.attended_rows > 0
        for op in ops:
            amounts = model.amounts(op, composition)
            if any(amounts.values()):
                lane, ways = op.lane.worker.value, _paths(OPS[op.kind].path, attends_on_host)
                is_of_layer = plan.stage.kind(op.layer) == "decoder"
                is_further = op.batch > 0 and not OPS[op.kind].moves_weights
                its.append(_VisitOp(lane, ways, is_of_layer, is_further, amounts))
        found[phase] = its
    return found


def _sums() -> defaultdict[str, list[float]]:
    return defaultdict(lambda: [0.0] * 4)


def _paths(path: Path, attends_on_host: bool) -> tuple[str, ...]:
    """The ones of WAYS that an op is on. Prompts are attended on the device."""
    match path:
        case Path.BOTH:
            return PATHS
        case Path.DEVICE:
            return PATHS[:1]
        case Path.HOST:
            return PATHS[1:] if attends_on_host else ()
        case Path.NEITHER:
            return ()
