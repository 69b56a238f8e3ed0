"""What a stage's ops will take, where the rows of each pass are known ahead.

Makes of plans, rates and rows what `simulate` plays; doesn't know when ops run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.cost import CostModel
from flexgen_ray.cost.moves import Moves
from flexgen_ray.cost.placed_rows import Composition
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.sharing import Demand, demand_of
from flexgen_ray.cost.simulate import Stream
from flexgen_ray.rows import NO_ROWS, Rows
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.window import window_ops
from flexgen_ray.schedule.zigzag import zigzag

RowsOf = Callable[[Op], Rows]


def stream(plan: StagePlan, hardware: HardwareSpec, rows: RowsOf, num_visits: int) -> Stream:
    """So many visits of a stage, as an executor would run them. rows: of an op's pass, by its visit
    and batch."""
    moves = Moves(plan, is_linked=not plan.stage.is_whole)
    batches = plan.policy.num_gpu_batches
    ops = filter(moves, zigzag(plan.stage, batches, range(num_visits), plan.num_blocks))
    return Stream(ops, Demands(plan, hardware, rows), window_ops(batches))


@dataclass(frozen=True)
class _Pass:
    """Rows, what follows from them, and what is known so far of ops that bring them."""

    rows: Rows
    composition: Composition | None
    demands: dict[tuple[OpKind, int, int], Demand] = field(default_factory=dict)


class Demands:
    """Of one stage's ops. rows: of an op's pass, by its visit and batch."""

    def __init__(self, plan: StagePlan, hardware: HardwareSpec, rows: Callable[[Op], Rows]) -> None:
        self._hardware = hardware
        self._cost = CostModel(plan)
        self._spare = plan.streamed_rows - 1
        self._rows = rows
        self._passes: dict[int, _Pass] = {}
        self._weights = _Pass(NO_ROWS, None)

    def __call__(self, op: Op) -> Demand:
        """Nothing, if its pass has no rows."""
        its = self._weights if op.kind in _OF_WEIGHTS else self._pass(self._rows(op))
        key = op.kind, op.layer, op.batch
        found = its.demands.get(key)
        if found is None:
            amounts = self._cost.amounts(op, its.composition)
            found = its.demands[key] = demand_of(amounts, self._hardware)
        return found

    def _pass(self, rows: Rows) -> _Pass:
        # Comparing rows would cost more than to derive anew what follows from equal ones.
        found = self._passes.get(id(rows))
        if found is None:
            composition = Composition(rows, self._spare) if rows.rows else None
            found = self._passes[id(rows)] = _Pass(rows, composition)
        return found


_OF_WEIGHTS = frozenset({OpKind.READ_WEIGHTS, OpKind.LOAD_WEIGHTS})
