"""Lower bound of a visit's duration: the busy seconds of each lane, resource and path.

No schedule is faster than its busiest lane or resource, nor than the path of one batch through the
layers; runs are compared with this bound.

`visit_seconds` adds up all ops of a visit. `visit_terms` derives the same sums in closed form, for
planners that try many shapes: the visit of a model with L layers and B batches consists of the ops
of one layer's first batch (L times), of a further batch in one layer (L * (B - 1) times), of the
layers at the model's ends, and of the weights, which cross the link once. So the amounts are
derived once from a plan with one layer and two batches, for the rates of any machine. (Where layers
differ, one pattern of them stands in for the layer, and L counts patterns.)

    seconds = fixed + L * per_layer + (B - 1) * (per_batch + L * per_layer_batch)

Knows plans and rates; no clock, and no dependencies beyond the paths.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Amounts, seconds_alone, seconds_by_resource
from flexgen_ray.layout.active_ops import ActiveOps
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.planned_rows import compose, shared_tokens
from flexgen_ray.layout.rows import Row, Rows
from flexgen_ray.schedule.ops import OPS, Op, OpKind, Path
from flexgen_ray.schedule.zigzag import zigzag

PHASES = ("prefill", "decode")
LEAST = "least"  # a visit in which one row of each batch decodes
# The ways of one batch through a stage: ops that wait for each other, with rows attended on the
# device or on the host. Weights and caches are prefetched, and no op awaits writes to disk.
PATHS = ("path by the device", "path by the host")
# Planners add up seconds of (phase, lane, resource or path), and bytes of ("bytes", tier).
Quantity = tuple[str, str]


def visit_seconds(plan: StagePlan, hardware: HardwareSpec, rows: Rows) -> dict[str, float]:
    """{lane or resource: seconds} of one visit of a stage whose batches all bring these rows."""
    model, composition = CostModel(plan), compose(plan, rows)
    is_active = ActiveOps(plan, in_ring=not plan.stage.is_whole)
    lanes: dict[str, float] = defaultdict(float)
    resources: dict[str, float] = defaultdict(float)
    for op in zigzag(plan.stage, plan.policy.num_gpu_batches, range(1), mixtures=plan.mixtures):
        # Weights that are prefetched for the next visit count there.
        if op.visit or not is_active(op):
            continue
        seconds = seconds_by_resource(model.amounts(op, composition), hardware)
        if seconds:
            lanes[op.lane.worker.value] += seconds_alone(seconds)
        for resource, each in seconds.items():
            resources[resource.name.lower()] += each
    # A resource and a lane have the same name where the disk is concerned; the longer counts.
    return resources | {name: max(lanes[name], resources.get(name, 0.0)) for name in lanes}


def decoding_rows(plan: StagePlan, position: int, count: int | None = None) -> Rows:
    """Rows of a decoding pass, each of which brings one token, at this position.

    count: None for a row in every slot of a batch.
    """
    slots = range(plan.policy.gpu_batch_size if count is None else count)
    before = shared_tokens(plan)
    return Rows(tuple(Row(slot, position, 1, slot, True, False, before) for slot in slots), ())


def prefilling_rows(plan: StagePlan) -> tuple[Rows, float]:
    """Rows of a prefill pass, and the number of such passes that a batch takes.

    A pass has prompts of mean length, of as many slots as it has room for.
    """
    workload = plan.workload
    length = round(workload.mean_prompt_len or workload.max_prompt_len) or 1
    count = max(1, min(plan.policy.gpu_batch_size, plan.cell_tokens // length))
    before = shared_tokens(plan)
    rows = tuple(Row(slot, 0, length, slot * length, True, True, before) for slot in range(count))
    return Rows(rows, ()), plan.policy.gpu_batch_size / count


@dataclass(frozen=True)
class VisitTerms:
    """Terms of a lane's, resource's or path's seconds in a visit; the module explains the sum."""

    fixed: float = 0.0
    per_layer: float = 0.0
    per_batch: float = 0.0
    per_layer_batch: float = 0.0


@lru_cache(maxsize=8192)
def visit_terms(
    plan: StagePlan, hardware: HardwareSpec, position: int, part: int = 1
) -> dict[Quantity, VisitTerms]:
    """Terms of a visit's seconds, by (phase or LEAST, lane, resource or path).

    plan: one with two batches, and one decoder layer or one pattern of layers. position: of the
    rows that decode. part: batches for whose rows experts run at once.
    """
    terms = {}
    for phase, ops in _visit_ops(plan, position, part).items():
        resources, lanes, paths = _sums(), _sums(), _sums()
        for op in ops:
            whole = seconds_by_resource(op.amounts, hardware)
            taken = {it: seconds / op.batches for it, seconds in whole.items()}
            # The index of the term in VisitTerms.
            alone, term = seconds_alone(taken), 2 * op.is_further + op.is_of_layer
            lanes[op.lane][term] += alone
            for resource, seconds in taken.items():
                resources[resource.name.lower()][term] += seconds
            for path in op.paths if not op.is_further else ():
                paths[path][term] += alone * op.batches
        # A resource and a lane have the same name where the disk is concerned; the longer counts.
        longer = {name: max(lanes[name], resources.get(name, [0.0]), key=sum) for name in lanes}
        for name, each in (resources | longer | paths).items():
            terms[phase, name] = VisitTerms(*each)
    return terms


@dataclass(frozen=True)
class _VisitOp:
    """An op with what it takes.

    is_of_layer: True if every decoder layer has such an op; is_further: True if only batches after
    a block's first one bring it. batches: for how many the op works at once; a batch takes its part
    of the amounts.
    """

    lane: str
    paths: tuple[str, ...]
    is_of_layer: bool
    is_further: bool
    amounts: Amounts
    batches: int


@lru_cache(maxsize=4096)
def _visit_ops(plan: StagePlan, position: int, part: int) -> dict[str, list[_VisitOp]]:
    """{phase or LEAST: ops of a visit}, the same for any machine's rates."""
    is_active = ActiveOps(plan, in_ring=not plan.stage.is_whole)
    # Experts run once a part, of which each batch takes its share.
    visit = zigzag(plan.stage, 2, range(1), mixtures=replace(plan.mixtures, batches=2))
    ops = [it for op in visit if not op.visit and is_active(op) for it in _shares(op, part)]
    model, visit_ops = CostModel(plan), {}
    rows_of = {
        "prefill": prefilling_rows(plan)[0],
        "decode": decoding_rows(plan, position),
        LEAST: decoding_rows(plan, position, 1),
    }
    for phase, rows in rows_of.items():
        composition = compose(plan, rows)
        attends_on_host = phase != "prefill" and plan.attends_on_host
        visit_ops[phase] = [
            _VisitOp(
                op.lane.worker.value,
                _paths(OPS[op.kind].path, attends_on_host),
                is_of_layer=plan.stage.kind(op.layer) == "decoder",
                is_further=is_further,
                amounts=amounts,
                batches=op.batches,
            )
            for op, is_further in ops
            if any((amounts := model.amounts(op, composition)).values())
        ]
    return visit_ops


def _shares(op: Op, size: int) -> list[tuple[Op, bool]]:
    """The op, and whether only batches after a block's first one bring it.

    Experts for a part of `size` batches have a share of each.
    """
    if op.kind is not OpKind.EXPERTS:
        return [(op, op.batch > 0 and not OPS[op.kind].moves_weights)]
    part = replace(op, batch=size - 1, batches=size)
    return [(part, False), (part, True)]


def _sums() -> defaultdict[str, list[float]]:
    return defaultdict(lambda: [0.0] * 4)


def _paths(path: Path, attends_on_host: bool) -> tuple[str, ...]:
    """The PATHS that an op is on. Prompts are always attended on the device."""
    match path:
        case Path.BOTH:
            return PATHS
        case Path.DEVICE:
            return PATHS[:1]
        case Path.HOST:
            return PATHS[1:] if attends_on_host else ()
        case Path.NEITHER:
            return ()
