"""Lanes at work: each runs its ops first in, first out, when what they wait for is done.

A crew is one thread that serves some lanes. Without CUDA every lane has a crew of its own. With
CUDA one crew issues the device's and the link's lanes, each on a stream, and events order them;
what blocks (host attention, disk) has its own thread. Knows nothing of what an op does, nor why it
waits.

Which thread serves which lanes, and with how many cores. Knows the machine; no ops.

How far a run is, for whoever asks from another thread: a stage that stands still looks alive.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from flexgen_ray.hardware.host import release_openmp_team
from flexgen_ray.runtime.meter import Meter, Timing
from flexgen_ray.schedule.ops import OPS, Lane, Op


@dataclass(frozen=True)
class Heartbeat:
    """num_ops: that have ended. seconds: how long the oldest op that depends on no neighbour has
    been under way, and which that is."""

    num_ops: int = 0
    seconds: float = 0.0
    op: str = ""


class OpWatch:
    """Runs ops, and knows which are under way."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._num_ops = 0
        self._under_way: dict[Lane, tuple[float, Op]] = {}

    def __call__(self, op: Op, ready_at: float) -> Timing | None:
        lane = op.lane
        self._under_way[lane] = time.monotonic(), op
        try:
            return self._run(op, ready_at)
        finally:
            del self._under_way[lane]
            self._num_ops += 1

    def heartbeat(self) -> Heartbeat:
        # Who waits for a neighbour is not to blame.
        own = [it for it in list(self._under_way.values()) if not OPS[it[1].kind].is_exchange]
        if not own:
            return Heartbeat(self._num_ops)
        began, op = min(own, key=lambda it: it[0])
        return Heartbeat(self._num_ops, time.monotonic() - began, f"{op.kind} of layer {op.layer}")


ON_STREAMS = frozenset(
    {Lane.DEVICE, Lane.LOAD_WEIGHTS, Lane.LOAD_CACHE, Lane.LOAD_SMALL, Lane.STORE}
)


@dataclass(frozen=True)
class Cores:
    """A machine's cores, as they are divided: for the device's maths (if the device is the CPU),
    and for host attention. Copies and disk requests take one each, and mostly wait."""

    total: int
    device: int
    host: int

    def seconds(self, lanes: dict[str, float]) -> float:
        """Of all cores, for so many seconds of each lane; the disk's requests take none."""
        taken = {Lane.DEVICE: self.device, Lane.HOST: self.host}
        idle = (Lane.DISK_READ, Lane.DISK_WRITE)
        work = sum(taken.get(Lane(lane), 1) * it for lane, it in lanes.items() if lane not in idle)
        return work / self.total


def divide_cores(num_threads: int, on_cuda: bool, attends_on_host: bool) -> Cores:
    """The same for every executor, for results may depend on it.

    Without host attention the device has all. With CUDA it needs one core to be issued to, and
    copies another.
    """
    if on_cuda:
        return Cores(num_threads, num_threads, num_threads)
    host = max(1, num_threads // 4) if attends_on_host else 0
    # Of two or three cores none can be spared: measured, sharing them is faster.
    device = num_threads - host if num_threads >= 4 else num_threads
    return Cores(num_threads, device, max(1, host))


def make_lane_workers(
    device: torch.device, cores: Cores, attends_by_torch: bool = False
) -> list[LaneWorker]:
    """A thread a worker; with CUDA one thread for all streams, one of which a worker has.

    To be made once: each stream that has multiplied keeps a workspace, and what it has freed.
    attends_by_torch: host attention takes torch's threads; else they would only be in the way.
    """
    served = {it: tuple(lane for lane in Lane if lane.worker is it) for it in Lane}
    served = {worker: lanes for worker, lanes in served.items() if lanes}
    threads = {Lane.DEVICE: cores.device, Lane.HOST: cores.host if attends_by_torch else 1}
    if device.type != "cuda":
        return [LaneWorker(lanes, threads.get(worker, 1)) for worker, lanes in served.items()]
    stream_of = {worker: torch.cuda.Stream(device) for worker in ON_STREAMS}
    streams = {lane: stream for it, stream in stream_of.items() for lane in served[it]}
    others = [
        LaneWorker(lanes, threads.get(worker, 1))
        for worker, lanes in served.items()
        if worker not in ON_STREAMS
    ]
    return [LaneWorker(tuple(streams), 1, streams), *others]


def device_wait(device: torch.device) -> Callable[[], None] | None:
    """What returns when the device has done all that it was given; a CPU has done it at once."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None


SWITCH_INTERVAL = 5e-4  # seconds; Python's own is ten times as long
# Runs an op that was ready at a time; tells when it ran, if not just now.
Run = Callable[[Op, float], Timing | None]


@dataclass(frozen=True)
class LaneWorker:
    """One thread's lanes, their CUDA streams if any, and the cores torch may use in it."""

    lanes: tuple[Lane, ...]
    num_threads: int = 1
    streams: Mapping[Lane, torch.cuda.Stream] = field(default_factory=dict)


class IssuedOp:
    """An op that was issued: how many ops it still waits for, and who waits for it.

    ready_at, ended_at: when the last of those ended, and when it did (perf_counter). With streams
    an op is done when it is launched; `event` tells when the device has run it.
    """

    __slots__ = (
        "dependents", "ended_at", "event", "index", "is_done", "lane", "missing", "op", "ready_at",
        "waits",
    )  # fmt: skip

    def __init__(self, index: int, op: Op) -> None:
        self.index = index
        self.op = op
        self.lane = op.lane
        self.missing = 0
        self.ready_at = self.ended_at = 0.0
        self.dependents: list[IssuedOp] = []
        self.is_done = False
        self.event: torch.cuda.Event | None = None
        self.waits: list[torch.cuda.Event] = []


class Lanes:
    """The crews of one run: started on entry, joined on exit, whatever happens between."""

    def __init__(
        self,
        run: Run,
        crews: Iterable[LaneWorker],
        meter: Meter,
        cancel: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._meter = meter
        self._cancel = cancel
        self._lock = threading.Lock()
        self._queues: dict[Lane, deque[IssuedOp]] = {lane: deque() for lane in Lane}
        self._posts = [
            _LaneQueues(crew, [self._queues[lane] for lane in crew.lanes]) for crew in crews
        ]
        self._post_of = {lane: post for post in self._posts for lane in post.crew.lanes}
        self._over = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._in_flight = 0
        self._resume_at = -1
        self._is_stopped = False
        self._error: BaseException | None = None
        self._num_threads = torch.get_num_threads()

    def issue(self, ticket: IssuedOp, waits: Iterable[IssuedOp]) -> None:
        """Queues an op behind `waits`, which were issued before."""
        lane = ticket.lane
        queue = self._queues[lane]
        with self._lock:
            self._in_flight += 1
            for other in waits:
                if other.lane is lane:
                    continue
                if not other.is_done:
                    other.dependents.append(ticket)
                    ticket.missing += 1
                    continue
                ticket.ready_at = max(ticket.ready_at, other.ended_at)
                if other.event is not None:
                    ticket.waits.append(other.event)
            queue.append(ticket)
            if not ticket.missing and queue[0] is ticket:
                self._post_of[lane].wake()

    def wait(self, ticket: IssuedOp) -> None:
        """Until the op is over; raises what ended the run, if something did."""
        with self._lock:
            self._over.wait_for(lambda: ticket.is_done or self._is_stopped)
        if self._error is not None:
            raise self._error

    def wait_for_room(self, window: int) -> None:
        """Until half of `window` ops at most are under way, if the whole of it is."""
        if self._in_flight < window:
            return
        with self._lock:
            self._resume_at = window // 2
            self._room.wait_for(lambda: self._in_flight <= window // 2 or self._is_stopped)
            self._resume_at = -1
        if self._error is not None:
            raise self._error

    def stop(self, error: BaseException | None = None) -> None:
        """No further op is begun, and nobody waits any longer."""
        with self._lock:
            self._error = self._error or error
            self._is_stopped = True
            self._over.notify_all()
            self._room.notify_all()
            for post in self._posts:
                post.wake()
        if self._cancel is not None:
            self._cancel()

    def __enter__(self) -> Lanes:
        # A lane that wakes must not wait long for one that issues, or counts.
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        # Nor for a garbage collection that looks at all that was ever imported.
        gc.freeze()
        release_openmp_team()
        for post in self._posts:
            name = f"lane {'+'.join(post.crew.lanes)}"
            post.thread = threading.Thread(target=self._work, args=(post,), name=name)
            post.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for post in self._posts:
            assert post.thread is not None
            post.thread.join()
        for post in self._posts:
            for stream in post.crew.streams.values():
                stream.synchronize()
        torch.set_num_threads(self._num_threads)
        sys.setswitchinterval(self._switch_interval)
        gc.unfreeze()

    @torch.inference_mode()
    def _work(self, post: _LaneQueues) -> None:
        # A thread's own number holds only after torch has given it the process's, on first use.
        torch.get_num_threads()
        torch.set_num_threads(post.crew.num_threads)
        try:
            while (ticket := self._next(post)) is not None:
                stream = post.crew.streams.get(ticket.lane)
                if stream is None:
                    self._perform(ticket, max(ticket.ready_at, post.ended_at))
                    post.ended_at = ticket.ended_at
                else:
                    torch.cuda.set_stream(stream)
                    self._launch(ticket, stream)
                self._finish(ticket)
        except BaseException as error:
            self.stop(error)

    def _next(self, post: _LaneQueues) -> IssuedOp | None:
        """The oldest op that may start; None when the run has stopped."""
        while True:
            with self._lock:
                if self._is_stopped:
                    return None
                heads = [q[0] for q in post.queues if q and not q[0].missing]
                if heads:
                    return min(heads, key=_issue_order) if len(heads) > 1 else heads[0]
                post.is_idle = True
            post.bell.acquire()

    def _perform(self, ticket: IssuedOp, ready_at: float) -> None:
        for event in ticket.waits:
            event.synchronize()
        timing = timed(self._run, ticket.op, ready_at)
        ticket.ended_at = timing.ended
        self._meter.note(ticket.op, timing)

    def _launch(self, ticket: IssuedOp, stream: torch.cuda.Stream) -> None:
        for event in ticket.waits:
            stream.wait_event(event)
        started = self._meter.mark(stream)
        self._run(ticket.op, 0.0)
        ticket.event = self._meter.mark(stream)
        self._meter.note_events(ticket.op, started, ticket.event)

    def _finish(self, ticket: IssuedOp) -> None:
        with self._lock:
            self._queues[ticket.lane].popleft()
            ticket.is_done = True
            self._in_flight -= 1
            if self._in_flight == self._resume_at:
                self._room.notify()
            for other in ticket.dependents:
                other.missing -= 1
                other.ready_at = max(other.ready_at, ticket.ended_at)
                if ticket.event is not None:
                    other.waits.append(ticket.event)
                if not other.missing and self._queues[other.lane][0] is other:
                    self._post_of[other.lane].wake()
            ticket.dependents.clear()
            if ticket.op.ends_visit:
                self._over.notify_all()


class _LaneQueues:
    """A crew at its place: its queues, its thread, and the bell that wakes it."""

    def __init__(self, crew: LaneWorker, queues: list[deque[IssuedOp]]) -> None:
        self.crew = crew
        self.queues = queues
        self.thread: threading.Thread | None = None
        self.ended_at = 0.0
        self.bell = threading.Lock()
        self.bell.acquire()
        self.is_idle = False

    def wake(self) -> None:
        """Call with the lanes' lock held."""
        if self.is_idle:
            self.is_idle = False
            self.bell.release()


def timed(run: Run, op: Op, ready_at: float) -> Timing:
    """Runs the op, and says when.

    An exchange with a neighbour counts as waiting: which part of it was work can't be told.
    """
    started = time.perf_counter()
    timing = run(op, ready_at)
    ended = time.perf_counter()
    busy = 0.0 if OPS[op.kind].is_exchange else ended - started
    return timing or Timing(started, ended, busy)


def _issue_order(ticket: IssuedOp) -> int:
    return ticket.index
