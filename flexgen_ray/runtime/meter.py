"""How long each lane was busy, and, if asked, every op's start and end.

Busy is time at work, never time spent waiting. Knows ops and clocks; not what an op does.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch

from flexgen_ray.config import HardwareSpec
from flexgen_ray.schedule.ops import Lane, Op, OpKind, Span

MAX_SPANS = 1_000_000  # of a trace; about 150 MB as JSON


@dataclass(frozen=True, slots=True)
class Timing:
    """When an op ran (perf_counter), and for how many seconds its lane counts as busy."""

    started: float
    ended: float
    busy: float


@dataclass(frozen=True, slots=True)
class VisitTiming:
    """One that is over: when it ended (perf_counter), the tokens it brought, and the modelled
    seconds of each lane and resource, if the run had a cost model."""

    ended: float
    new_tokens: int
    prefill_tokens: int
    modelled: dict[str, float]


@dataclass(frozen=True)
class StageMeasurements:
    """Seconds of a run, {lane: seconds}. modelled_*: by a cost model at the rates of `hardware`, if
    the run had one; cores: all lanes' core seconds over the cores, where the device is a CPU.
    is_emulated: whether times are those of emulated hardware. peak_gpu_bytes: what
    torch took of a GPU. sampling: of the device's busy seconds, those in which tokens were chosen.
    """

    wall: float = 0.0
    busy: dict[str, float] = field(default_factory=dict)
    modelled_lanes: dict[str, float] = field(default_factory=dict)
    modelled_resources: dict[str, float] = field(default_factory=dict)
    cores: float = 0.0
    hardware: HardwareSpec | None = None
    is_emulated: bool = False
    visits: list[VisitTiming] = field(default_factory=list)
    peak_gpu_bytes: int = 0
    sampling: float = 0.0

    @property
    def binding_lane(self) -> str:
        """The busiest."""
        return max(self.busy, key=lambda lane: self.busy[lane], default="none")

    @property
    def bound(self) -> dict[str, float]:
        """What no run can be shorter than: the modelled seconds of each lane and resource."""
        bound = self.modelled_lanes | self.modelled_resources
        return bound | {"cores": self.cores} if self.cores else bound


@dataclass
class Meter:
    """Of one run; every lane is written by one thread.

    keeps_spans: remember the first MAX_SPANS ops. busy: {lane: seconds}, modelled seconds where
    the run is emulated; sampling: those of ops that choose tokens.
    """

    keeps_spans: bool = False
    busy: dict[Lane, float] = field(default_factory=lambda: dict.fromkeys(Lane, 0.0))
    spans: list[Span] = field(default_factory=list)
    sampling: float = 0.0

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        self._launched: deque[tuple[Op, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._origin: tuple[torch.cuda.Event, float] | None = None

    def note(self, op: Op, timing: Timing) -> None:
        """An op that has run."""
        self.busy[op.lane.worker] += timing.busy
        if op.kind is OpKind.SAMPLE:
            self.sampling += timing.busy
        if self.keeps_spans and len(self.spans) < MAX_SPANS:
            started, ended = timing.started - self._began, timing.ended - self._began
            self.spans.append(Span(op, started, ended))

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """An event on the stream, now."""
        if self._origin is None:
            origin = torch.cuda.Event(enable_timing=True)
            origin.record(stream)
            origin.synchronize()
            self._origin = origin, time.perf_counter()
        # A lane that waits for it sleeps, for others need the core.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(stream)
        return event

    def note_events(self, op: Op, started: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        """An op between two events; its time is taken when the device has passed them."""
        self._launched.append((op, started, ended))
        while self._launched and self._launched[0][2].query():
            self._take()

    def settle(self) -> None:
        """Takes the time of what is still under way."""
        while self._launched:
            self._launched[0][2].synchronize()
            self._take()

    def _take(self) -> None:
        op, started, ended = self._launched.popleft()
        assert self._origin is not None
        origin, origin_time = self._origin
        # CUDA tells times as float32: after an hour not finer than a quarter of a millisecond.
        first = origin_time + origin.elapsed_time(started) / 1e3
        seconds = started.elapsed_time(ended) / 1e3
        self.note(op, Timing(first, first + seconds, seconds))
