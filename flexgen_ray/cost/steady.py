"""How long a visit takes in the long run, by playing a few: what a planner judges plans by.

`predict.visit_seconds` is the bound that no run beats; this is what the schedule makes of it. Knows
plans, rates and rows.

What a stage's ops will take, where the rows of each pass are known ahead.

Makes of plans, rates and rows what `simulate` plays; doesn't know when ops run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import CORES, Amounts, Demand, Resource, demand_of
from flexgen_ray.cost.simulate import OpStream, simulate_ring
from flexgen_ray.layout.active_ops import ActiveOps
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import NO_ROWS, Composition, Rows
from flexgen_ray.schedule.dependencies import window_ops
from flexgen_ray.schedule.ops import OPS, Lane, Op, OpKind
from flexgen_ray.schedule.zigzag import zigzag

RowsOfOp = Callable[[Op], Rows]
CoreShares = tuple[tuple[str, float], ...]  # (lane or resource, of the cores that it takes)


def op_stream(
    plan: StagePlan,
    hardware: HardwareSpec,
    rows: RowsOfOp,
    num_visits: int,
    core_shares: CoreShares = (),
) -> OpStream:
    """So many visits of a stage, as an executor would run them. rows: of an op's pass, by its visit
    and batch. core_shares: none where the cores aren't the device too."""
    is_active = ActiveOps(plan, in_ring=not plan.stage.is_whole)
    batches = plan.policy.num_gpu_batches
    ops = filter(is_active, zigzag(plan.stage, batches, range(num_visits), plan.num_blocks))
    return OpStream(ops, OpDemands(plan, hardware, rows, core_shares), window_ops(batches))


@dataclass(frozen=True)
class _PassDemands:
    """Rows, what follows from them, and what is known so far of ops that bring them."""

    rows: Rows
    composition: Composition | None
    demands: dict[tuple[OpKind, int, int], Demand] = field(default_factory=dict)


class OpDemands:
    """Of one stage's ops; the arguments are those of `stream`."""

    def __init__(
        self,
        plan: StagePlan,
        hardware: HardwareSpec,
        rows: RowsOfOp,
        core_shares: CoreShares = (),
    ) -> None:
        self._hardware = hardware
        self._core_shares = dict(core_shares)
        self._cost = CostModel(plan)
        self._spare = plan.streamed_rows - 1
        self._rows = rows
        self._passes: dict[int, _PassDemands] = {}
        self._weights = _PassDemands(NO_ROWS, None)

    def __call__(self, op: Op) -> Demand:
        """Nothing, if its pass has no rows."""
        its = self._weights if OPS[op.kind].moves_weights else self._pass(self._rows(op))
        key = op.kind, op.layer, op.batch
        found = its.demands.get(key)
        if found is None:
            amounts = self._cost.amounts(op, its.composition)
            found = its.demands[key] = self._demand(op, amounts)
        return found

    def _demand(self, op: Op, amounts: Amounts) -> Demand:
        demand, of_cores = demand_of(amounts, self._hardware), self._core_shares
        if not of_cores or not demand.shares:
            return demand
        used = {Resource(it).name.lower(): share for it, share in demand.shares.items()}
        if op.lane.worker is Lane.DEVICE:
            used[Lane.DEVICE.value] = 1.0
        cores = sum(of_cores.get(name, 0.0) * share for name, share in used.items())
        return replace(demand, shares=demand.shares | {CORES: cores})

    def _pass(self, rows: Rows) -> _PassDemands:
        # Comparing rows would cost more than to derive anew what follows from equal ones.
        found = self._passes.get(id(rows))
        if found is None:
            composition = Composition(rows, self._spare) if rows.rows else None
            found = self._passes[id(rows)] = _PassDemands(rows, composition)
        return found


FIRST_VISITS = 1  # in which lanes and slots fill
LAST_VISITS = 1


def steady_visit_seconds(plan: StagePlan, hardware: HardwareSpec, rows: Rows) -> float:
    """Seconds of a visit of a model in one stage, all of whose batches bring these rows."""
    return pipeline_visit_seconds([plan], [hardware], rows)


def pipeline_visit_seconds(
    plans: list[StagePlan],
    hardware: list[HardwareSpec],
    rows: Rows,
    core_shares: Sequence[CoreShares] | None = None,
) -> float:
    """Seconds from the end of one visit to that of the next, where plans are joined to a ring, each
    on hardware of its own, and every batch of every block brings these rows. core_shares: each
    stage's, as for `stream`."""
    num_blocks = plans[0].num_blocks
    filling, measured = FIRST_VISITS * num_blocks, LAST_VISITS * num_blocks
    streams = [
        replace(op_stream(plan, its, lambda op: rows, filling + measured, cores), keeps_spans=False)
        for plan, its, cores in zip(plans, hardware, core_shares or [()] * len(plans), strict=True)
    ]
    ends = simulate_ring(streams, num_blocks)[-1].visit_ends
    return (ends[-1] - ends[filling - 1]) / measured
