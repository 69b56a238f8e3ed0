"""Lanes at work: threads that run each lane's ops in order, as soon as their dependencies are done.

This file also divides the machine's cores among the threads, and reports a run's progress. It knows
nothing of what an op does, nor of which op may start next (schedule/queueing.py does).

A thread takes its next op from the queues, runs it, and reports it as done; queueing.py then names
the ops that became ready, and their threads are woken. One lock guards the queues and flags. It is
held for these few lines only, never while an op runs, which may take seconds, and never while a
thread sleeps.

Without CUDA every worker has a thread of its own. With CUDA one thread issues the ops of all lanes
that use the GPU, each lane's on a stream of its own; such an op is done when it is launched, and
CUDA events order streams and threads. Ops that block (host attention, disk) keep their threads.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from flexgen_ray.hardware.host import release_openmp_team
from flexgen_ray.runtime.meter import Meter, Timing
from flexgen_ray.schedule.ops import ON_STREAMS, OPS, Lane, Op
from flexgen_ray.schedule.queueing import LaneQueues, QueuedOp

SWITCH_INTERVAL = 5e-4  # seconds; Python's own is ten times as long
# Runs an op that became ready at a time; returns when it ran, unless that is the call's own time.
Run = Callable[[Op, float], Timing | None]


@dataclass(frozen=True)
class LaneWorker:
    """One thread's lanes, the number of cores that torch may use in it, and its CUDA streams."""

    lanes: tuple[Lane, ...]
    num_threads: int = 1
    streams: Mapping[Lane, torch.cuda.Stream] = field(default_factory=dict)


class IssuedOp(QueuedOp):
    """An op of the run, with the earlier ops that it waits for, until it is done.

    ended_at: when it ended (perf_counter). event: passed when the device has run the op, on a lane
    with a stream; there the op is done as soon as it is launched.
    """

    __slots__ = ("ended_at", "event", "waits_for")

    def __init__(self, index: int, op: Op) -> None:
        super().__init__(index, op)
        self.waits_for: Iterable[IssuedOp] = ()
        self.ended_at = 0.0
        self.event: torch.cuda.Event | None = None

    def awaited_events(self) -> list[torch.cuda.Event]:
        """Events of the ops of other lanes that this op waits for; a lane's stream is in order."""
        events = [other.event for other in self.waits_for if other.lane is not self.lane]
        return [event for event in events if event is not None]


class Lanes:
    """The lanes of one run; their threads start on entry and are joined on exit, whatever happens.

    max_in_flight: most ops that are issued and not done. cancel: called when the run stops, to end
    what ops under way may wait for.
    """

    def __init__(
        self,
        run: Run,
        workers: Iterable[LaneWorker],
        meter: Meter,
        max_in_flight: int,
        cancel: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._meter = meter
        self._cancel = cancel
        self._lock = threading.Lock()
        self._queues: LaneQueues[IssuedOp] = LaneQueues(max_in_flight)
        self._threads = [_LaneThread(worker) for worker in workers]
        self._thread_of = {lane: thread for thread in self._threads for lane in thread.worker.lanes}
        self._visit_ended = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._is_stopped = False
        self._error: BaseException | None = None
        self._num_threads = torch.get_num_threads()

    def issue(self, issued: IssuedOp, dependencies: Iterable[IssuedOp]) -> None:
        """Queue an op on its lane, to start when its dependencies, issued before, are done."""
        issued.waits_for = dependencies
        with self._lock:
            if self._queues.add(issued, dependencies):
                self._thread_of[issued.lane].wake()

    def wait(self, issued: IssuedOp) -> None:
        """Wait until an op that ends a visit is done; raises the error that ended the run."""
        with self._lock:
            self._visit_ended.wait_for(lambda: issued.is_done or self._is_stopped)
        if self._error is not None:
            raise self._error

    def wait_for_room(self) -> None:
        """Once max_in_flight ops are in flight, wait until only half of them are."""
        if not self._queues.is_full:
            return
        with self._lock:
            self._room.wait_for(lambda: not self._queues.is_full or self._is_stopped)
        if self._error is not None:
            raise self._error

    def stop(self, error: BaseException | None = None) -> None:
        """Start no further op, and end all waiting; the first error given is the run's."""
        with self._lock:
            self._error = self._error or error
            self._is_stopped = True
            self._visit_ended.notify_all()
            self._room.notify_all()
            for thread in self._threads:
                thread.wake()
        if self._cancel is not None:
            self._cancel()

    def __enter__(self) -> Lanes:
        # Shorten the GIL switch interval, so that a woken lane thread runs at once.
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        # A garbage collection in the run need not look at all modules that were ever imported.
        gc.freeze()
        release_openmp_team()
        for thread in self._threads:
            thread.start(self._work)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()
        torch.set_num_threads(self._num_threads)
        sys.setswitchinterval(self._switch_interval)
        gc.unfreeze()
        # A device that has failed fails here too; the run's own error is the one to tell.
        with nullcontext() if self._error is None else suppress(RuntimeError):
            for thread in self._threads:
                for stream in thread.worker.streams.values():
                    stream.synchronize()
            self._meter.settle()

    @torch.inference_mode()
    def _work(self, thread: _LaneThread) -> None:
        """Run ops until the run stops; the life of a lane's thread."""
        # torch gives a thread the process's number on first use, which would undo set_num_threads.
        torch.get_num_threads()
        torch.set_num_threads(thread.worker.num_threads)
        try:
            while (issued := self._next(thread)) is not None:
                stream = thread.worker.streams.get(issued.lane)
                if stream is None:
                    self._perform(issued, thread)
                else:
                    torch.cuda.set_stream(stream)
                    self._launch(issued, stream)
                self._finish(issued)
        except BaseException as error:
            self.stop(error)

    def _next(self, thread: _LaneThread) -> IssuedOp | None:
        """Oldest op that may start, waited for if need be; None when the run has stopped."""
        while True:
            with self._lock:
                if self._is_stopped:
                    return None
                if (issued := self._queues.next(thread.worker.lanes)) is not None:
                    return issued
                # Set with the lock held, so that the next op that becomes ready wakes this thread.
                thread.is_idle = True
            thread.sleep()

    def _perform(self, issued: IssuedOp, thread: _LaneThread) -> None:
        """Run an op in this thread, from beginning to end."""
        for event in issued.awaited_events():
            event.synchronize()
        ready_at = thread.ended_at
        for other in issued.waits_for:
            ready_at = max(ready_at, other.ended_at)
        timing = timed(self._run, issued.op, ready_at)
        issued.ended_at = thread.ended_at = timing.ended
        self._meter.note(issued.op, timing)

    def _launch(self, issued: IssuedOp, stream: torch.cuda.Stream) -> None:
        """Launch an op on its stream, behind the events of ops that it waits for."""
        for event in issued.awaited_events():
            stream.wait_event(event)
        started = self._meter.mark(stream)
        self._run(issued.op, 0.0)
        issued.event = self._meter.mark(stream)
        self._meter.note_events(issued.op, started, issued.event)

    def _finish(self, issued: IssuedOp) -> None:
        """Report an op as done, and wake the threads that waited for it."""
        issued.waits_for = ()
        with self._lock:
            was_full = self._queues.is_full
            for other in self._queues.done(issued):
                self._thread_of[other.lane].wake()
            if was_full and not self._queues.is_full:
                self._room.notify()
            if issued.op.ends_visit:
                self._visit_ended.notify_all()


class _LaneThread:
    """The thread of a worker; ended_at: when the last op that it ran ended.

    It sleeps by acquiring `_wakeup`, a lock that is held whenever the thread is awake; a plain lock
    takes less time than a condition or an event.
    """

    def __init__(self, worker: LaneWorker) -> None:
        self.worker = worker
        self.ended_at = 0.0
        self.is_idle = False
        self._thread: threading.Thread | None = None
        self._wakeup = threading.Lock()
        self._wakeup.acquire()

    def start(self, work: Callable[[_LaneThread], None]) -> None:
        """Start work(self) in a thread."""
        name = f"lane {'+'.join(self.worker.lanes)}"
        self._thread = threading.Thread(target=work, args=(self,), name=name)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread's end."""
        assert self._thread is not None, "start comes first"
        self._thread.join()

    def sleep(self) -> None:
        """Wait for wake; called by the thread itself, without the lanes' lock."""
        self._wakeup.acquire()

    def wake(self) -> None:
        """Wake the thread if it sleeps; called with the lanes' lock held."""
        if self.is_idle:
            self.is_idle = False
            self._wakeup.release()


def timed(run: Run, op: Op, ready_at: float) -> Timing:
    """Run an op and return when it ran.

    An exchange with a neighbour counts as waiting, because its working part can't be measured.
    """
    started = time.perf_counter()
    timing = run(op, ready_at)
    ended = time.perf_counter()
    busy = 0.0 if OPS[op.kind].is_exchange else ended - started
    return timing or Timing(started, ended, busy)


def make_lane_workers(
    device: torch.device, cores: Cores, attends_by_torch: bool = False
) -> list[LaneWorker]:
    """Workers of a stage: one for each lane that has a worker; with CUDA one for all streams.

    With CUDA each lane has a stream of its own. A stream runs in order what was launched on it, and
    an op may be launched before its data has come. If lanes shared a stream, FINISH of a cell would
    stand behind the next cell's attention, and with that wait for a copy. Memory that isn't a
    buffer of the schedule, such as temporaries and a pass's index tensors, has no event: an op that
    makes some may share it with ops of its own lane only (tests/late_streams.py).

    Make the workers once a stage, not once a run: each stream that has multiplied keeps a
    workspace, and the memory that was freed on it.
    attends_by_torch: host attention runs on torch's threads; otherwise they would be in the way.
    """
    on_streams = ON_STREAMS if device.type == "cuda" else frozenset()
    lanes_of: dict[Lane, tuple[Lane, ...]] = {}
    for lane in Lane:
        if lane not in on_streams:
            lanes_of[lane.worker] = (*lanes_of.get(lane.worker, ()), lane)
    threads = {Lane.DEVICE: cores.device, Lane.HOST: cores.host if attends_by_torch else 1}
    workers = [LaneWorker(lanes, threads.get(worker, 1)) for worker, lanes in lanes_of.items()]
    if on_streams:
        streams = {lane: torch.cuda.Stream(device) for lane in sorted(on_streams)}
        workers.append(LaneWorker(tuple(streams), 1, streams))
    return workers


def device_wait(device: torch.device) -> Callable[[], None] | None:
    """Function that waits until the device has run all ops launched; None for a CPU."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None


@dataclass(frozen=True)
class Cores:
    """Numbers of cores: of the process, for the device's maths, and for host attention.

    Copies and disk requests take one core each, and mostly wait.
    """

    total: int
    device: int
    host: int

    def seconds(self, lanes: dict[str, float]) -> float:
        """Seconds that all cores together need for the lanes' seconds; disk requests take none."""
        cores_of = {Lane.DEVICE: self.device, Lane.HOST: self.host}
        free = (Lane.DISK_READ, Lane.DISK_WRITE)
        work = sum(
            cores_of.get(Lane(lane), 1) * seconds
            for lane, seconds in lanes.items()
            if lane not in free
        )
        return work / self.total


def divide_cores(num_threads: int, on_cuda: bool, attends_on_host: bool) -> Cores:
    """Cores of a stage; the same for every executor, because results may depend on them.

    Without host attention the device has all cores. With CUDA one core launches the device's ops,
    and another copies and waits for the disk: a late launch would hold up the device, and a late
    thread of host attention all of that.
    """
    if on_cuda:
        return Cores(num_threads, num_threads, max(1, num_threads - 2))
    host = max(1, num_threads // 4) if attends_on_host else 0
    # With two or three cores none can be spared: sharing them was measured to be faster.
    device = num_threads - host if num_threads >= 4 else num_threads
    return Cores(num_threads, device, max(1, host))


@dataclass(frozen=True)
class Heartbeat:
    """Progress of a run, for other threads and machines that ask whether it stands still.

    num_ops: ops that have ended. seconds: time that the oldest op under way has taken, among ops
    that depend on no neighbour; op: that op, in words.
    """

    num_ops: int = 0
    seconds: float = 0.0
    op: str = ""


class OpWatch:
    """Runs ops and remembers which are under way."""

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
        """Progress so far; may be called from any thread."""
        # An op that waits for a neighbour doesn't show that this stage stands still.
        own = [it for it in list(self._under_way.values()) if not OPS[it[1].kind].is_exchange]
        if not own:
            return Heartbeat(self._num_ops)
        began, op = min(own, key=lambda pair: pair[0])
        return Heartbeat(self._num_ops, time.monotonic() - began, f"{op.kind} of layer {op.layer}")
