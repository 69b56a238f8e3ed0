"""Resources of a machine, and how ops that run at the same time share them.

An op takes an amount (bytes, flops, values) of some resources. Alone, it uses its resources in
parallel, so it lasts as long as the slowest of them takes. Ops that together demand more of a
resource than the machine has are slowed by the same factor. The emulation and the simulation both
follow this rule.

Knows amounts and rates; no schedule and no wall clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from flexgen_ray.config import HardwareSpec


class Resource(StrEnum):
    """A scarce resource; each value is the name of its rate in HardwareSpec."""

    __hash__ = str.__hash__  # Enum's __hash__ is Python code, and resources are dictionary keys

    H2D = "h2d_bytes_per_s"
    D2H = "d2h_bytes_per_s"
    DISK_READ = "disk_read_bytes_per_s"
    DISK_WRITE = "disk_write_bytes_per_s"
    HOST_MEMORY = "host_bytes_per_s"
    HOST_ATTENTION = "host_attention_bytes_per_s"
    FLOPS = "device_flops_per_s"
    DECODE_FLOPS = "device_decode_flops_per_s"  # of products no larger than a decoding batch's
    DEVICE_ATTENTION = "device_attention_bytes_per_s"
    DEVICE_MEMORY = "device_bytes_per_s"
    DEQUANTIZE = "dequantize_bytes_per_s"
    DEVICE_OPS = "device_ops_per_s"  # small ops beside the matrix products
    ELEMENTWISE = "elementwise_bytes_per_s"  # bytes that small ops read and write
    SAMPLING = "sampled_values_per_s"  # logits from which a token is sampled
    NETWORK = "network_bytes_per_s"  # to the next stage


Amounts = dict[Resource, float]
CORES = "cores"  # of a CPU that is also the device; ops have shares of it, but no amounts
TIME_TOLERANCE = 1e-12  # relative; ends that differ by less are simultaneous

# Dequantization precedes an op's products, and launch-bound small ops stand between them.
_SERIAL = (
    Resource.DEQUANTIZE,
    Resource.DEVICE_OPS,
    Resource.ELEMENTWISE,
    Resource.SAMPLING,
)


def seconds_by_resource(amounts: Amounts, hardware: HardwareSpec) -> dict[Resource, float]:
    """Seconds for which an op would use each resource if it had all of it."""
    return {resource: amount / getattr(hardware, resource) for resource, amount in amounts.items()}


def seconds_alone(taken: dict[Resource, float]) -> float:
    """Duration of an op that runs alone, from its `seconds_by_resource`.

    An op uses its resources in parallel, so the slowest counts; dequantization and launch-bound
    small ops are serial and are added.
    """
    serial = sum(taken.get(resource, 0.0) for resource in _SERIAL)
    return serial + max(
        (seconds for resource, seconds in taken.items() if resource not in _SERIAL), default=0.0
    )


@dataclass(frozen=True, slots=True)
class Demand:
    """Demand of an op on a machine.

    seconds: duration of the op if it runs alone. shares: the part of each resource, and of CORES,
    that the op then uses, at most 1 each.
    """

    seconds: float
    shares: dict[str, float]


def demand_of(amounts: Amounts, hardware: HardwareSpec) -> Demand:
    """Demand of an op that takes these amounts."""
    taken = seconds_by_resource(amounts, hardware)
    seconds = seconds_alone(taken)
    return Demand(seconds, {resource: each / seconds for resource, each in taken.items() if each})


def speed(shares: Mapping[str, float], load: Mapping[str, float]) -> float:
    """Speed of an op among others, 1 when it runs alone.

    load: sum of the shares of all running ops, this one included, of each resource. The resource
    that is most overcommitted sets the speed: with a load of 2.5 it is 1 / 2.5.
    """
    most = 1.0
    for resource in shares:
        if load[resource] > most:
            most = load[resource]
    return 1 / most


class RunningOp(Protocol):
    """An op that is running: its demand, its present speed, and when it ends at that speed."""

    demand: Demand
    ends: float
    speed: float


RunningOpT = TypeVar("RunningOpT", bound=RunningOp)


class SharedResources(Generic[RunningOpT]):
    """The resources of one machine in modelled time, and the ops that run on them."""

    def __init__(self) -> None:
        self._running: list[RunningOpT] = []
        self._load = dict.fromkeys((*Resource, CORES), 0.0)

    def begin(self, op: RunningOpT, now: float) -> None:
        """Start an op, which may slow the others."""
        self._change_load(op, 1, now)
        op.speed = speed(op.demand.shares, self._load)
        op.ends = now + op.demand.seconds / op.speed
        self._running.append(op)

    def next_end(self) -> float:
        """Time of the first end among running ops, if no other begins; infinite if none runs."""
        first = math.inf
        for op in self._running:
            if op.ends < first:
                first = op.ends
        return first

    def pop_ended(self, now: float) -> list[RunningOpT]:
        """Remove and return the ops that have ended by now; the others may speed up."""
        latest = now + TIME_TOLERANCE * now
        ended = [op for op in self._running if op.ends <= latest]
        for op in ended:
            self._running.remove(op)
            self._change_load(op, -1, now)
        return ended

    def _change_load(self, op: RunningOpT, sign: int, now: float) -> None:
        """Add or remove an op's shares, and move the ends of the others to their new speeds.

        The work that another op has done so far was done at its old speed, so only what remains of
        it is stretched: (ends - now) * old speed / new speed.
        """
        is_short, load = False, self._load
        for resource, share in op.demand.shares.items():
            before = load[resource]
            after = load[resource] = before + sign * share
            is_short = is_short or before > 1 or after > 1
        if is_short:
            for other in self._running:
                changed = speed(other.demand.shares, load)
                other.ends = now + (other.ends - now) * other.speed / changed
                other.speed = changed
