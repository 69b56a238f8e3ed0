"""Runs ops and sums what they should take on given hardware; paces them by it, if asked.

Knows the cost model and the clock of the emulation; not when ops run.
"""

from __future__ import annotations

from collections import defaultdict

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.cost import CostModel, Resource, seconds_by_resource
from flexgen_ray.runtime.cells import Cells
from flexgen_ray.runtime.meter import Timing
from flexgen_ray.runtime.pacer import Pacer
from flexgen_ray.schedule.ops import LANE, Lane, Op

Seconds = dict[Lane, dict[Resource | None, float]]  # None: of the op as a whole


class Modelled:
    """Cells under a cost model. time_scale: wall seconds a modelled second; None doesn't pace."""

    def __init__(self, cells: Cells, hardware: HardwareSpec, time_scale: float | None) -> None:
        self._cells = cells
        self._hardware = hardware
        self._cost = CostModel(cells.plan)
        self._pacer = None if time_scale is None else Pacer(hardware, time_scale)
        self._of_visit: dict[int, Seconds] = {}
        self.seconds = _no_seconds()

    def run(self, op: Op, ready_at: float) -> Timing | None:
        """As Cells.run; tells when a paced op ran in emulated time."""
        amounts = self._cost.amounts(op, self._cells.composition(op))
        if amounts:
            taken = seconds_by_resource(amounts, self._hardware)
            # Each lane is one thread, and writes nothing but its own sums.
            of_visit = self._of_visit.get(op.visit)
            if of_visit is None:
                of_visit = self._of_visit.setdefault(op.visit, _no_seconds())
            sums = of_visit[LANE[op.kind].worker]
            sums[None] += max(taken.values())
            for resource, seconds in taken.items():
                sums[resource] += seconds
        if self._pacer is None:
            self._cells.run(op, ready_at)
            return None
        job = self._pacer.begin(amounts, ready_at)
        self._cells.run(op, ready_at)
        self._pacer.end(job)
        return Timing(job.started, job.ended, job.seconds)

    def end_visit(self, visit: int) -> None:
        """What was fetched for a visit that never came doesn't count."""
        for lane, sums in self._of_visit.pop(visit, {}).items():
            for resource, seconds in sums.items():
                self.seconds[lane][resource] += seconds

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


def _no_seconds() -> Seconds:
    return {lane: defaultdict(float) for lane in Lane}
