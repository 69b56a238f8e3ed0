"""Steady duration of a visit, by simulating a few visits; planners compare plans by it.

`bound.visit_seconds` is a lower bound of any schedule; this is what our schedule takes.

Makes the ops, plans, rates and rows into streams that simulate.py plays. Knows plans, rates and
rows; not when ops run.
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
from flexgen_ray.layout.planned_rows import compose
from flexgen_ray.layout.rows import NO_ROWS, Composition, Rows
from flexgen_ray.schedule.dependencies import window_ops
from flexgen_ray.schedule.ops import OPS, Lane, Op, OpKind
from flexgen_ray.schedule.zigzag import zigzag

RowsOfOp = Callable[[Op], Rows]
CoreShares = tuple[tuple[str, float], ...]  # (lane or resource, share of the cores it takes)

FILLING_VISITS = 1  # per block, in which lanes and slots fill; not measured
MEASURED_VISITS = 1  # per block


def steady_visit_seconds(plan: StagePlan, hardware: HardwareSpec, rows: Rows) -> float:
    """Seconds of a visit of a model in one stage, all of whose batches bring these rows."""
    return pipeline_visit_seconds([plan], [hardware], rows)


def pipeline_visit_seconds(
    plans: list[StagePlan],
    hardware: list[HardwareSpec],
    rows: Rows,
    core_shares: Sequence[CoreShares] | None = None,
) -> float:
    """Seconds from the end of one visit to the end of the next, in a ring of stages.

    hardware, core_shares: one per stage, as for `op_stream`. Every batch of every block brings the
    same rows.
    """
    num_blocks = plans[0].num_blocks
    filling, measured = FILLING_VISITS * num_blocks, MEASURED_VISITS * num_blocks
    shares = core_shares or [()] * len(plans)
    streams = [
        replace(
            op_stream(plan, spec, lambda op: rows, filling + measured, cores), keeps_spans=False
        )
        for plan, spec, cores in zip(plans, hardware, shares, strict=True)
    ]
    ends = simulate_ring(streams, num_blocks)[-1].visit_ends
    return (ends[-1] - ends[filling - 1]) / measured


def op_stream(
    plan: StagePlan,
    hardware: HardwareSpec,
    rows: RowsOfOp,
    num_visits: int,
    core_shares: CoreShares = (),
) -> OpStream:
    """The ops of num_visits visits of a stage, as an executor would run them, for `simulate`.

    rows: returns the rows of an op's pass, which depend on its visit and batch. core_shares: shares
    of the cores that lanes and resources take; empty if the device is no CPU.
    """
    is_active = ActiveOps(plan, in_ring=not plan.stage.is_whole)
    batches = plan.policy.num_gpu_batches
    ops = zigzag(plan.stage, batches, range(num_visits), plan.num_blocks, plan.mixtures)
    return OpStream(
        filter(is_active, ops), OpDemands(plan, hardware, rows, core_shares), window_ops(batches)
    )


class OpDemands:
    """Demand of each op of one stage, remembered for ops that recur; arguments as `op_stream`'s."""

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
        self._plan = plan
        self._rows = rows
        self._passes: dict[int, _PassDemands] = {}
        self._weights = _PassDemands(NO_ROWS, None)

    def __call__(self, op: Op) -> Demand:
        """Demand of an op; no seconds if its pass has no rows."""
        known = self._weights if OPS[op.kind].moves_weights else self._pass(self._rows(op))
        key = op.kind, op.layer, op.batch, op.group
        demand = known.demands.get(key)
        if demand is None:
            amounts = self._cost.amounts(op, known.composition)
            demand = known.demands[key] = self._demand(op, amounts)
        return demand

    def _demand(self, op: Op, amounts: Amounts) -> Demand:
        demand, core_shares = demand_of(amounts, self._hardware), self._core_shares
        if not core_shares or not demand.shares:
            return demand
        used = {Resource(name).name.lower(): share for name, share in demand.shares.items()}
        if op.lane.worker is Lane.DEVICE:
            used[Lane.DEVICE.value] = 1.0
        cores = sum(core_shares.get(name, 0.0) * share for name, share in used.items())
        return replace(demand, shares=demand.shares | {CORES: cores})

    def _pass(self, rows: Rows) -> _PassDemands:
        # Comparing rows would cost more than deriving the demands of equal rows again.
        known = self._passes.get(id(rows))
        if known is None:
            composition = compose(self._plan, rows) if rows.rows else None
            known = self._passes[id(rows)] = _PassDemands(rows, composition)
        return known


@dataclass(frozen=True)
class _PassDemands:
    """Demands known so far of the ops whose passes bring the same rows, by (kind, layer, batch,
    group).

    rows: held so that no other rows can get their id.
    """

    rows: Rows
    composition: Composition | None
    demands: dict[tuple[OpKind, int, int, int], Demand] = field(default_factory=dict)
