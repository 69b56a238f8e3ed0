"""How ops that run together share a machine: the rule of the emulation and of the simulation.

An op alone takes the seconds of the resource that it needs longest; ops that together need more of
a resource than there is are slowed alike. Knows amounts and rates; no clock.

Resources, how much of them an op takes, and how many seconds that is at a machine's rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from flexgen_ray.config import HardwareSpec


class Resource(StrEnum):
    """What is scarce; each value is the name of its rate in HardwareSpec."""

    __hash__ = str.__hash__  # Enum's own is Python, and these are looked up all the time

    H2D = "h2d_bytes_per_s"
    D2H = "d2h_bytes_per_s"
    DISK_READ = "disk_read_bytes_per_s"
    DISK_WRITE = "disk_write_bytes_per_s"
    HOST_MEMORY = "host_bytes_per_s"
    HOST_ATTENTION = "host_attention_bytes_per_s"
    FLOPS = "device_flops_per_s"
    DECODE_FLOPS = "device_decode_flops_per_s"  # of batches no larger than a decoding one
    DEVICE_ATTENTION = "device_attention_bytes_per_s"
    DEVICE_MEMORY = "device_bytes_per_s"
    DEQUANTIZE = "dequantize_bytes_per_s"
    DEVICE_OPS = "device_ops_per_s"  # small ones, beside products
    ELEMENTWISE = "elementwise_bytes_per_s"  # read and written by those
    SAMPLING = "sampled_values_per_s"  # logits of which a token is drawn
    NETWORK = "network_bytes_per_s"  # to the next stage


Amounts = dict[Resource, float]

_SERIAL = (
    Resource.DEQUANTIZE,
    Resource.DEVICE_OPS,
    Resource.ELEMENTWISE,
    Resource.SAMPLING,
)


def seconds_by_resource(amounts: Amounts, hardware: HardwareSpec) -> dict[Resource, float]:
    """Seconds that each resource is taken for, each with all of itself."""
    return {resource: amount / getattr(hardware, resource) for resource, amount in amounts.items()}


def seconds_alone(taken: dict[Resource, float]) -> float:
    """Of an op that has the machine to itself, by its `seconds_by_resource`: what it takes of them
    it takes at the same time, but packed values are unpacked first, and small ops stand between
    large ones."""
    first = sum(taken.get(resource, 0.0) for resource in _SERIAL)
    return first + max((it for by, it in taken.items() if by not in _SERIAL), default=0.0)


CORES = "cores"  # of a CPU that is the device too; ops take shares of them, and no amounts
TIME_TOLERANCE = 1e-12  # of the time so far; ends that differ by rounding alone


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


class RunningOp:
    """Something under way: what it takes, its speed (1 unless it is slowed), when it ends so."""

    __slots__ = ("demand", "ends", "speed")

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.ends = 0.0
        self.speed = 1.0


RunningOpT = TypeVar("RunningOpT", bound=RunningOp)


class SharedResources(Generic[RunningOpT]):
    """Resources, and who uses them, in modelled time."""

    def __init__(self) -> None:
        self._running: list[RunningOpT] = []
        self._load = dict.fromkeys((*Resource, CORES), 0.0)

    def begin(self, work: RunningOpT, now: float) -> None:
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

    def pop_ended(self, now: float) -> list[RunningOpT]:
        """What has ended by now, and is under way no longer."""
        latest = now + TIME_TOLERANCE * now
        ended = [work for work in self._running if work.ends <= latest]
        for work in ended:
            self._running.remove(work)
            self._share(work, -1, now)
        return ended

    def _share(self, work: RunningOpT, sign: int, now: float) -> None:
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
