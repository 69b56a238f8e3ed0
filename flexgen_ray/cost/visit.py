"""Time that the ops of a visit take: by lane, by resource, and on one batch's way through a stage.

A visit of any number of layers and batches is made of the ops of one layer's first batch and of a
further one, of the layers at the model's ends, and of weights, which cross once. So amounts are
derived once for a stage's kind and shape, and take any machine's rates. Knows plans; no clock.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.cost import CostModel
from flexgen_ray.cost.moves import Moves
from flexgen_ray.cost.placed_rows import Composition
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.predict import decoding, prefilling
from flexgen_ray.cost.scarce import Amounts, seconds_alone, seconds_by_resource
from flexgen_ray.schedule.ops import LANE, OpKind
from flexgen_ray.schedule.zigzag import zigzag

PHASES = ("prefill", "decode")
Quantity = tuple[str, str]  # (phase, lane, resource or way): seconds; ("bytes", tier): bytes
# A batch's way through a stage: ops that wait for each other, where rows are attended on the device
# or on the host. Weights and caches come ahead of need, and what is written to disk is not awaited.
WAYS = ("way by the device", "way by the host")
_OF_WEIGHTS = frozenset({OpKind.READ_WEIGHTS, OpKind.LOAD_WEIGHTS})
_AHEAD = _OF_WEIGHTS | {OpKind.READ_CACHE, OpKind.LOAD_CACHE, OpKind.WRITE_CACHE}
_BY_DEVICE = frozenset(
    {OpKind.CHOOSE, OpKind.GATHER_VALUES, OpKind.LOAD_VALUES, OpKind.ATTEND_DEVICE}
)
_BY_HOST = frozenset(
    {OpKind.STORE_CACHE, OpKind.APPEND_CACHE, OpKind.ATTEND_HOST, OpKind.LOAD_ATTENTION}
)


@dataclass(frozen=True)
class Taken:
    """Seconds of a lane, a resource or a way: of a visit of one batch, once and for each layer, and
    of each further batch."""

    once: float = 0.0
    each: float = 0.0
    once_more: float = 0.0
    each_more: float = 0.0


@lru_cache(maxsize=8192)
def seconds_of_visit(
    plan: StagePlan, hardware: HardwareSpec, position: int
) -> dict[Quantity, Taken]:
    """By (phase, lane, resource or way). plan: of one decoder layer and two batches."""
    found = {}
    for phase, ops in _ops_of_visit(plan, position).items():
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
            found[phase, name] = Taken(*each)
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
def _ops_of_visit(plan: StagePlan, position: int) -> dict[str, list[_VisitOp]]:
    """{phase: ops of a visit}, for any machine's rates."""
    moves = Moves(plan, is_linked=not plan.stage.is_whole)
    ops = [op for op in zigzag(plan.stage, 2, range(1)) if not op.visit and moves(op)]
    model, found = CostModel(plan), {}
    for phase, rows in zip(PHASES, (prefilling(plan)[0], decoding(plan, position)), strict=True):
        composition, its = Composition(rows, plan.streamed_rows - 1), []
        attends_on_host = phase == "decode" and plan.attended_rows > 0
        for op in ops:
            amounts = model.amounts(op, composition)
            if any(amounts.values()):
                lane, ways = LANE[op.kind].worker.value, _ways(op.kind, attends_on_host)
                is_of_layer = plan.stage.kind(op.layer) == "decoder"
                is_further = op.batch > 0 and op.kind not in _OF_WEIGHTS
                its.append(_VisitOp(lane, ways, is_of_layer, is_further, amounts))
        found[phase] = its
    return found


def _sums() -> defaultdict[str, list[float]]:
    return defaultdict(lambda: [0.0] * 4)


def _ways(kind: OpKind, attends_on_host: bool) -> tuple[str, ...]:
    """On which of a batch's ways the op is. Prompts are attended on the device."""
    if kind in _AHEAD:
        return ()
    if kind in _BY_DEVICE:
        return WAYS[:1]
    if kind in _BY_HOST:
        return WAYS[1:] if attends_on_host else ()
    return WAYS
