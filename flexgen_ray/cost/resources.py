"""Resources of a machine, and how ops that run at the same time share them.

An op takes an amount (bytes, flops, values) of some resources. Alone, it uses its resources in
parallel, so it lasts as long as the slowest of them takes. Ops that together demand more of a
resource than the machine has are slowed by the same factor.

A GPU's link has one copy engine each way, which serves one copy at a time. Copies are cut into
pieces of COPY_PIECE (16 MiB). When a piece has crossed and another copy waits, the copy goes to the
end of the queue. With the letters for pieces, where b is ready while A's first piece crosses:

    copy A of 48 MiB, b of 1 MiB    A b A A
    copy A of 48 MiB, B of 40 MiB   A B A B A B

The emulation and the simulation both follow these rules, by the same `SharedResources`.
Knows amounts and rates; no schedule and no wall clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from flexgen_ray.config import HardwareSpec
from flexgen_ray.layout.placement import COPY_PIECE


class Resource(StrEnum):
    """A scarce resource; each value is the name of its rate in HardwareSpec.

    The issuing thread has seconds there in place of rates. It is one resource, ISSUE, which ops
    load by two amounts: ISSUE (1 for each op) and LAUNCHES.
    """

    __hash__ = str.__hash__  # Enum's __hash__ is Python code, and resources are dictionary keys

    H2D = "h2d_bytes_per_s"
    D2H = "d2h_bytes_per_s"
    DISK_READ = "disk_read_bytes_per_s"
    DISK_WRITE = "disk_write_bytes_per_s"
    HOST_MEMORY = "host_bytes_per_s"
    HOST_ATTENTION = "host_attention_bytes_per_s"
    FLOPS = "device_flops_per_s"
    DECODE_FLOPS = "device_decode_flops_per_s"  # of products no larger than a decoding batch's
    EXPERT_FLOPS = "device_expert_flops_per_s"  # of a mixture's experts, as both above
    DECODE_EXPERT_FLOPS = "device_decode_expert_flops_per_s"
    DEVICE_ATTENTION = "device_attention_bytes_per_s"
    DEVICE_MEMORY = "device_bytes_per_s"
    DEQUANTIZE = "dequantize_bytes_per_s"
    DEVICE_OPS = "device_ops_per_s"  # small ops beside the matrix products
    ELEMENTWISE = "elementwise_bytes_per_s"  # bytes that small ops read and write
    SAMPLING = "sampled_values_per_s"  # logits from which a token is sampled
    NETWORK = "network_bytes_per_s"  # to the next stage
    APPEND = "append_bytes_per_s"  # new keys and values that one thread of the host places
    ISSUE = "issue_seconds"  # the thread that issues the ops of all of a GPU's streams
    LAUNCHES = "launch_seconds"  # torch ops that this thread launches


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
_BY_SECONDS = (Resource.ISSUE, Resource.LAUNCHES)
_LINKS = (Resource.H2D, Resource.D2H)
_LEAST_PIECE = 1e-9  # of a piece; what is less is an error of rounding


def seconds_by_resource(amounts: Amounts, hardware: HardwareSpec) -> dict[Resource, float]:
    """Seconds for which an op would use each resource if it had all of it."""
    taken, issuing = {}, 0.0
    for resource, amount in amounts.items():
        if resource in _BY_SECONDS:
            issuing += amount * getattr(hardware, resource)
        else:
            taken[resource] = amount / getattr(hardware, resource)
    if issuing:
        taken[Resource.ISSUE] = issuing
    return taken


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
    that the op then uses, at most 1 each. engine: the link whose copy engine the op takes for
    itself; None if it shares all resources. piece: the part of `seconds` that a piece takes.
    """

    seconds: float
    shares: dict[str, float]
    engine: Resource | None = None
    piece: float = 0.0


def demand_of(amounts: Amounts, hardware: HardwareSpec) -> Demand:
    """Demand of an op that takes these amounts."""
    taken = seconds_by_resource(amounts, hardware)
    seconds = seconds_alone(taken)
    shares: dict[str, float] = {
        resource: each / seconds for resource, each in taken.items() if each
    }
    # An op that also computes brings but a few indices across.
    if hardware.has_copy_engines and Resource.FLOPS not in amounts:
        for link in _LINKS:
            if nbytes := amounts.get(link):
                return Demand(seconds, shares, link, seconds * COPY_PIECE / nbytes)
    return Demand(seconds, shares)


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
    """An op that is running, or waits for a copy engine.

    demand: its demand; speed: its present speed; ends: when it ends at that speed, infinite while
    it waits; left: seconds of it alone that were left when it last began to run or to wait.
    """

    demand: Demand
    ends: float
    speed: float
    left: float


RunningOpT = TypeVar("RunningOpT", bound=RunningOp)


class SharedResources(Generic[RunningOpT]):
    """The resources of one machine in modelled time, and the ops that run on them."""

    def __init__(self) -> None:
        self._running: list[RunningOpT] = []
        self._load = dict.fromkeys((*Resource, CORES), 0.0)
        self._engines = {link: _CopyEngine[RunningOpT]() for link in _LINKS}
        self._contended: list[_CopyEngine[RunningOpT]] = []  # engines for which copies wait

    @property
    def is_contended(self) -> bool:
        """True if some op is slowed, or waits for a copy engine."""
        return bool(self._contended) or any(load > 1.0 + 1e-9 for load in self._load.values())

    @property
    def load(self) -> dict[str, float]:
        """Sum of the running ops' shares of each resource; 1 for a copy engine that serves."""
        serving = {link: 1.0 for link, engine in self._engines.items() if engine.served is not None}
        return self._load | serving

    def begin(self, op: RunningOpT, now: float, left: float | None = None) -> None:
        """Start an op, which may slow the others, or queue it at its copy engine.

        left: seconds of it alone that it still needs; None for all of them.
        """
        op.left = op.demand.seconds if left is None else left
        link = op.demand.engine
        if link is not None:
            engine = self._engines[link]
            if engine.served is not None:
                engine.queue(op, now)
                self._note_waiting()
                return
            engine.served = op
        self._start(op, now)

    def next_event(self) -> float:
        """Time of the first end, or change of a copy engine's turn, if no other op begins.

        Infinite if no op runs.
        """
        first = math.inf
        for op in self._running:
            if op.ends < first:
                first = op.ends
        for engine in self._contended:
            first = min(first, engine.turn_ends)
        return first

    def pop_ended(self, now: float) -> list[RunningOpT]:
        """Remove and return the ops that have ended by now; the others may speed up.

        A copy whose turn is over by now makes room for the next one.
        """
        latest = now + TIME_TOLERANCE * abs(now)
        ended = [op for op in self._running if op.ends <= latest]
        for op in ended:
            self._stop(op, now)
            if op.demand.engine is not None:
                self._serve_next(self._engines[op.demand.engine], now)
                self._note_waiting()
        for engine in self._contended:
            if engine.turn_ends <= latest:
                served = engine.served
                assert served is not None, "copies wait for one that is served"
                self._stop(served, now)
                served.left, served.ends = engine.left_after_turn, math.inf
                engine.waiting.append(served)
                self._serve_next(engine, now)
        return ended

    def _note_waiting(self) -> None:
        self._contended = [engine for engine in self._engines.values() if engine.waiting]

    def _serve_next(self, engine: _CopyEngine[RunningOpT], now: float) -> None:
        """Start the copy that has waited longest, if any, for one piece if others wait too."""
        engine.served = None
        if engine.waiting:
            engine.served = op = engine.waiting.popleft()
            engine.left_after_turn = op.left - op.demand.piece
            self._start(op, now)

    def _start(self, op: RunningOpT, now: float) -> None:
        self._change_load(op, 1, now)
        op.speed = speed(op.demand.shares, self._load)
        op.ends = now + op.left / op.speed
        self._running.append(op)

    def _stop(self, op: RunningOpT, now: float) -> None:
        self._running.remove(op)
        self._change_load(op, -1, now)

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


class _CopyEngine(Generic[RunningOpT]):
    """The copy engine of one direction of the link: the copy that it serves, and those that wait.

    left_after_turn: seconds alone of the served copy that are left when its turn ends, because
    others wait; 0 or less if it ends before.
    """

    __slots__ = ("left_after_turn", "served", "waiting")

    def __init__(self) -> None:
        self.served: RunningOpT | None = None
        self.waiting: deque[RunningOpT] = deque()
        self.left_after_turn = 0.0

    @property
    def turn_ends(self) -> float:
        """Time at which the turn of the served copy ends; infinite if the copy ends before."""
        op = self.served
        if op is None or self.left_after_turn <= _LEAST_PIECE * op.demand.piece:
            return math.inf
        return op.ends - self.left_after_turn / op.speed

    def queue(self, op: RunningOpT, now: float) -> None:
        """Let a copy wait; one that was served without a limit is served to its piece's end."""
        served = self.served
        assert served is not None, "a copy that finds the engine free is served"
        if not self.waiting:
            whole, piece = served.demand.seconds, served.demand.piece
            done = whole - (served.ends - now) * served.speed
            pieces = math.floor(done / piece + _LEAST_PIECE) + 1
            self.left_after_turn = whole - pieces * piece
        op.ends = math.inf
        self.waiting.append(op)
