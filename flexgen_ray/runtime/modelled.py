"""Sums of modelled seconds: runs ops, and adds the seconds that the cost model expects of them.

Knows the cost model; not when ops run. A wrapper named by import path may stand in its place, as
the emulation of benchmarks/emulation.py does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Amounts, Resource, seconds_alone, seconds_by_resource
from flexgen_ray.layout.active_ops import ActiveOps
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.runtime.handlers import OpHandlers
from flexgen_ray.runtime.meter import Timing
from flexgen_ray.schedule.ops import Lane, Op

Seconds = dict[Lane, dict[Resource | None, float]]  # None: seconds of ops that run alone


class Modelled:
    """Op handlers of one run, with the modelled seconds of the ops that they run.

    is_active: True for the ops that are dispatched. is_emulated: True if times are emulated.
    mixtures: those of the modelled plan, by which the stage's ops are generated; a subclass may
    model another plan than the handlers'.
    """

    is_emulated = False

    def __init__(self, handlers: OpHandlers, plan: StagePlan, hardware: HardwareSpec) -> None:
        self.handlers = handlers
        self._hardware = hardware
        self._cost = CostModel(plan)
        self.mixtures = plan.mixtures
        self.is_active = ActiveOps(plan, in_ring=handlers.passes.channel is not None)
        self._of_visit: dict[int, Seconds] = {}
        self.seconds = _no_seconds()

    def run(self, op: Op, ready_at: float) -> Timing | None:
        """Run the op and add its modelled seconds; see OpHandlers.run.

        Returns when the op ran, where that isn't the time that the call took.
        """
        self._add(op)
        self.handlers.run(op, ready_at)
        return None

    def _add(self, op: Op) -> Amounts:
        """Add the op's modelled seconds to its visit; returns the amounts they come from."""
        handlers = self.handlers
        amounts = {} if handlers.is_idle(op) else self._cost.amounts(op, handlers.composition(op))
        if amounts:
            taken = seconds_by_resource(amounts, self._hardware)
            # Each lane's sums are written by one thread.
            of_visit = self._of_visit.get(op.visit)
            if of_visit is None:
                of_visit = self._of_visit.setdefault(op.visit, _no_seconds())
            sums = of_visit[op.lane.worker]
            sums[None] += seconds_alone(taken)
            for resource, seconds in taken.items():
                sums[resource] += seconds
        return amounts

    def end_visit(self, visit: int) -> dict[str, float]:
        """Modelled seconds of each lane and resource in a visit.

        Prefetches for a visit that never comes are not counted.
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
        # A resource and a lane may have the same name (the disk's); then the lane counts.
        return resources | lanes

    def cancel(self) -> None:
        """End immediately any waiting of ops under way; called when a run stops early."""

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


@dataclass(frozen=True)
class RunWrapper:
    """Replacement for Modelled, named by its import path so that Ray actors find it.

    path: `module:name` of a subclass of Modelled, or of a function that returns one, called at the
    start of each run as (handlers, plan, hardware, **options). options: serializable values.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Callable[..., Modelled]:
        """Import what `path` names; ValueError if it can't be imported here."""
        module, _, name = self.path.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"run_wrapper {self.path!r} can't be imported ({error}); it must be module:name, "
                "on the path of every stage's process"
            ) from error


def _no_seconds() -> Seconds:
    return {lane: defaultdict(float) for lane in Lane}
