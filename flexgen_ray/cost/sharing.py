"""How ops that run together share a machine: the rule of the emulation and of the simulation.

An op alone takes the seconds of the resource that it needs longest; ops that together need more of
a resource than there is are slowed alike. Knows amounts and rates; no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.cost import Amounts, Resource, seconds_by_resource


@dataclass(frozen=True, slots=True)
class Demand:
    """seconds: that an op takes alone; shares: what it then uses of each resource, 1 at most."""

    seconds: float
    shares: dict[Resource, float]


def demand_of(amounts: Amounts, hardware: HardwareSpec) -> Demand:
    """Of an op that takes these amounts."""
    taken = seconds_by_resource(amounts, hardware)
    seconds = max(taken.values(), default=0.0)
    return Demand(seconds, {resource: it / seconds for resource, it in taken.items() if it})


def speed(shares: Mapping[Resource, float], load: Mapping[Resource, float]) -> float:
    """Of an op, 1 when alone; load: the sum of the shares of all that run, its own included."""
    return min((1 / max(load[resource], 1.0) for resource in shares), default=1.0)
