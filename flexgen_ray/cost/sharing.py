"""How ops that run together share a machine: the rule of the emulation and of the simulation.

An op alone takes the seconds of the resource that it needs longest; ops that together need more of
a resource than there is are slowed alike. Knows amounts and rates; no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.scarce import Amounts, Resource, seconds_alone, seconds_by_resource

CORES = "cores"  # of a CPU that is the device too; ops take shares of them, and no amounts
SIMULTANEOUS = 1e-12  # of the time so far; ends that differ by rounding alone


@dataclass(frozen=True, slots=True)
class Demand:
    """seconds: that an op takes alone; shares: what it then uses of each resource, or of CORES, 1
    at most."""

    seconds: float
    shares: dict[str, float]


def demand_of(amounts: Amounts, hardware: HardwareSpec) -> Demand:
    """Of an op that takes these amounts."""
    taken = seconds_by_resource(amounts, hardware)
    seconds = seconds_alone(taken)
    return Demand(seconds, {resource: it / seconds for resource, it in taken.items() if it})


def speed(shares: Mapping[str, float], load: Mapping[str, float]) -> float:
    """Of an op, 1 when alone; load: the sum of the shares of all that run, its own included."""
    most = 1.0
    for resource in shares:
        if load[resource] > most:
            most = load[resource]
    return 1 / most


class Work:
    """Something under way: what it takes, its speed (1 unless it is slowed), when it ends so."""

    __slots__ = ("demand", "ends", "speed")

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.ends = 0.0
        self.speed = 1.0


W = TypeVar("W", bound=Work)


class Machine(Generic[W]):
    """Resources, and who uses them, in modelled time."""

    def __init__(self) -> None:
        self._running: list[W] = []
        self._load = dict.fromkeys((*Resource, CORES), 0.0)

    def begin(self, work: W, now: float) -> None:
        self._share(work, 1, now)
        work.speed = speed(work.demand.shares, self._load)
        work.ends = now + work.demand.seconds / work.speed
        self._running.append(work)

    def next_end(self) -> float:
        """When the first of what is under way ends, if nothing else begins."""
        first = math.inf
        for work in self._running:
            if work.ends < first:
                first = work.ends
        return first

    def take_ended(self, now: float) -> list[W]:
        """What has ended by now, and is under way no longer."""
        latest = now + SIMULTANEOUS * now
        ended = [work for work in self._running if work.ends <= latest]
        for work in ended:
            self._running.remove(work)
            self._share(work, -1, now)
        return ended

    def _share(self, work: W, sign: int, now: float) -> None:
        """The others' progress so far counts at the old speeds."""
        is_short, load = False, self._load
        for resource, share in work.demand.shares.items():
            before = load[resource]
            after = load[resource] = before + sign * share
            is_short = is_short or before > 1 or after > 1
        if is_short:
            for other in self._running:
                changed = speed(other.demand.shares, load)
                other.ends = now + (other.ends - now) * other.speed / changed
                other.speed = changed
