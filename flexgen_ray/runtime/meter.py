"""Measurements of a run: how long each lane was busy and, if asked for, when each op ran.

A lane is busy while it runs an op, not while it waits. Knows ops and clocks; not what an op does.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch

from flexgen_ray.config import HardwareSpec
from flexgen_ray.schedule.ops import Lane, Op, OpKind, Span

MAX_SPANS = 1_000_000  # most ops of a trace, which take about 150 MB as JSON
_SPANS_KEPT = 256  # of a worker, to be compared with those of its other lanes


@dataclass(frozen=True, slots=True)
class Timing:
    """Time at which an op ran (perf_counter), and seconds for which its lane counts as busy."""

    started: float
    ended: float
    busy: float


@dataclass(frozen=True, slots=True)
class VisitTiming:
    """Measurements of one visit.

    ended: when its last op ended (perf_counter, emulated if the run is); new_tokens: sampled;
    prefill_tokens: of prompts.
    modelled: seconds of each lane and resource, if the run had a cost model.
    """

    ended: float
    new_tokens: int
    prefill_tokens: int
    modelled: dict[str, float]


@dataclass(frozen=True)
class StageMeasurements:
    """Measurements of a stage's run, in seconds unless the name says otherwise.

    wall: of the whole run; busy: of each lane.
    modelled_lanes, modelled_resources: by the cost model at the rates of `hardware`, if the run had
    one; cores: core seconds of all lanes, divided by the number of cores, if the device is a CPU.
    is_emulated: True if times are those of emulated hardware.
    peak_gpu_bytes: most GPU memory that torch reserved; sampling: busy seconds of the device in
    which tokens were sampled. recomputed_tokens: those of rows that were set back, in the first
    stage.
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
    recomputed_tokens: int = 0

    @property
    def binding_lane(self) -> str:
        """Busiest lane."""
        return max(self.busy, key=lambda lane: self.busy[lane], default="none")

    @property
    def bound(self) -> dict[str, float]:
        """Lower bounds of the run: modelled seconds of each lane and resource."""
        bound = self.modelled_lanes | self.modelled_resources
        return bound | {"cores": self.cores} if self.cores else bound


@dataclass
class Meter:
    """Meter of one run; each lane's numbers are written by one thread.

    keeps_spans: record when the first MAX_SPANS ops ran.
    busy: seconds of each lane, emulated seconds in an emulated run; sampling: of ops that sample.
    visit_ends: when the last op of each visit ended, until it is taken.
    """

    keeps_spans: bool = False
    busy: dict[Lane, float] = field(default_factory=lambda: dict.fromkeys(Lane, 0.0))
    spans: list[Span] = field(default_factory=list)
    sampling: float = 0.0
    visit_ends: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        self._launched: deque[tuple[Op, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._origin: tuple[torch.cuda.Event, float] | None = None
        self._covered: dict[Lane, list[tuple[float, float]]] = {}  # by worker, disjoint, in order

    def note(self, op: Op, timing: Timing) -> None:
        """Count an op that has run."""
        self.busy[op.lane.worker] += timing.busy
        if op.kind is OpKind.SAMPLE:
            self.sampling += timing.busy
        if op.ends_visit:
            self.visit_ends[op.visit] = timing.ended
        if self.keeps_spans and len(self.spans) < MAX_SPANS:
            started, ended = timing.started - self._began, timing.ended - self._began
            self.spans.append(Span(op, started, ended))

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Record an event on the stream, to measure from or to."""
        if self._origin is None:
            origin = torch.cuda.Event(enable_timing=True)
            origin.record(stream)
            origin.synchronize()
            self._origin = origin, time.perf_counter()
        # blocking: a thread that waits for the event sleeps, because others need the core.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(stream)
        return event

    def note_events(self, op: Op, started: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        """Count an op between two events, as soon as the device has passed them."""
        self._launched.append((op, started, ended))
        while self._launched and self._launched[0][2].query():
            self._take()

    def settle(self) -> None:
        """Wait for the ops that are still under way, and count them."""
        while self._launched:
            self._launched[0][2].synchronize()
            self._take()

    def _take(self) -> None:
        op, started, ended = self._launched.popleft()
        assert self._origin is not None
        origin, origin_time = self._origin
        # CUDA reports float32: after an hour its steps are a quarter of a millisecond.
        first = origin_time + origin.elapsed_time(started) / 1e3
        seconds = started.elapsed_time(ended) / 1e3
        self.note(op, Timing(first, first + seconds, seconds))
        # A worker's lanes run side by side on their streams, and a second counts once.
        covered = self._covered.setdefault(op.lane.worker, [])
        self.busy[op.lane.worker] -= seconds - _cover(covered, first, first + seconds)


def _cover(covered: list[tuple[float, float]], start: float, end: float) -> float:
    """Add a span to disjoint ones in order; returns by how much they grow.

    Only the last spans are kept, since streams are never far apart.
    """
    last = len(covered)
    while last and covered[last - 1][0] > end:
        last -= 1
    first = last
    while first and covered[first - 1][1] >= start:
        first -= 1
    merged = covered[first:last]
    ends = [(start, end), *merged]
    joined = min(low for low, _ in ends), max(high for _, high in ends)
    covered[first:last] = [joined]
    del covered[:-_SPANS_KEPT]
    return joined[1] - joined[0] - sum(high - low for low, high in merged)
