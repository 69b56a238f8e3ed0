"""Runs ops and sums what they should take on given hardware; paces them by it, if asked.

Knows the cost model and the clock of the emulation; not when ops run.
"""

from __future__ import annotations

import time
from collections import defaultdict

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Amounts, Resource, seconds_alone, seconds_by_resource
from flexgen_ray.layout.moves import Moves
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.runtime.handlers import OpHandlers
from flexgen_ray.runtime.meter import Timing
from flexgen_ray.runtime.pacer import Pacer
from flexgen_ray.schedule.ops import LANE, Lane, Op, OpKind

Seconds = dict[Lane, dict[Resource | None, float]]  # None: of the op as a whole


class Modelled:
    """Cells under the cost model of a plan: their own, or that of a larger model's likeness.

    time_scale: wall seconds a modelled second; None doesn't pace.
    """

    def __init__(
        self, cells: OpHandlers, plan: StagePlan, hardware: HardwareSpec, time_scale: float | None
    ) -> None:
        self._cells = cells
        # Of what the model it stands for dispatches, some may be nothing to do here.
        self._acts = Moves(cells.plan, cells.passes.link is not None)
        self._hardware = hardware
        self._cost = CostModel(plan)
        self._pacer = None if time_scale is None else Pacer(hardware, time_scale)
        self._of_visit: dict[int, Seconds] = {}
        self.seconds = _no_seconds()

    def run(self, op: Op, ready_at: float) -> Timing | None:
        """As Cells.run; tells when a paced op ran in emulated time."""
        cells = self._cells
        amounts = {} if cells.is_idle(op) else self._cost.amounts(op, cells.composition(op))
        if amounts:
            taken = seconds_by_resource(amounts, self._hardware)
            # Each lane is one thread, and writes nothing but its own sums.
            of_visit = self._of_visit.get(op.visit)
            if of_visit is None:
                of_visit = self._of_visit.setdefault(op.visit, _no_seconds())
            sums = of_visit[LANE[op.kind].worker]
            sums[None] += seconds_alone(taken)
            for resource, seconds in taken.items():
                sums[resource] += seconds
        if self._pacer is None:
            self._act(op, ready_at)
            return None
        return self._run_paced(self._pacer, op, amounts, ready_at)

    def _run_paced(self, pacer: Pacer, op: Op, amounts: Amounts, ready_at: float) -> Timing:
        """What arrives does so when it does; what is sent has crossed the network before that."""
        if op.kind in _ARRIVALS:
            self._act(op, ready_at)
            ready_at = time.perf_counter()
        job = pacer.begin(amounts, ready_at)
        if op.kind not in _ARRIVALS and op.kind is not OpKind.SEND:
            self._act(op, ready_at)
        pacer.end(job)
        if op.kind is OpKind.SEND:
            self._act(op, ready_at)
        return Timing(job.started, job.ended, job.seconds)

    def _act(self, op: Op, ready_at: float) -> None:
        if self._acts(op):
            self._cells.run(op, ready_at)

    def end_visit(self, visit: int) -> dict[str, float]:
        """Modelled seconds of each lane and resource in a visit.

        What was fetched for one that never came doesn't count.
        """
        lanes: dict[str, float] = {}
        resources: dict[str, float] = defaultdict(float)
        for lane, sums in self._of_visit.pop(visit, {}).items():
            for resource, seconds in sums.items():
                self.seconds[lane][resource] += seconds
                if resource is None:
                    lanes[lane.value] = seconds
                else:
                    resources[resource.name.lower()] += seconds
        # The disk is a resource and a lane of the same name.
        return resources | lanes

    def cancel(self) -> None:
        """Holds no op back any longer."""
        if self._pacer is not None:
            self._pacer.cancel()

    def lanes(self) -> dict[str, float]:
        """Modelled seconds of each lane."""
        return {lane.value: sums[None] for lane, sums in self.seconds.items() if sums[None]}

    def resources(self) -> dict[str, float]:
        """Modelled seconds of each resource, whatever lanes share it."""
        total: dict[str, float] = defaultdict(float)
        for sums in self.seconds.values():
            for resource, seconds in sums.items():
                if resource is not None and seconds:
                    total[resource.name.lower()] += seconds
        return dict(total)


_ARRIVALS = frozenset({OpKind.RECV_TOKENS, OpKind.RECV_ROWS, OpKind.RECV})


def _no_seconds() -> Seconds:
    return {lane: defaultdict(float) for lane in Lane}
