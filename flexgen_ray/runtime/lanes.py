"""Lanes at work: threads that run each lane's ops in order, as soon as their dependencies are done.

This file also divides the machine's cores among the threads, and reports a run's progress. It knows
nothing of what an op does, nor why one op waits for another (schedule/dependencies.py does).

The life of an op, say op 17 on lane `store`, which waits for ops 3 and 12 of other lanes:

    issue      (the executor's thread) appends it to the queue of its lane, enters it in the lists
               `dependents` of ops 3 and 12, and sets num_pending to 2. An op that is done already
               isn't waited for. Ops of the same lane need no entry: a lane's queue is in order.
    finish(3)  (the thread that ran op 3) lowers num_pending to 1.
    finish(12) lowers it to 0. If op 17 is at the head of its queue, the thread of `store` is woken.
    _next      (the thread of `store`) takes the oldest op at the head of one of its queues that has
               nothing pending.
    run        without the lock: an op may take seconds, and other lanes go on meanwhile.
    finish(17) removes it from its queue, and does for op 17's dependents what was done for it.

One lock guards queues, counters and flags. It is held for these few lines only, never while an op
runs and never while a thread sleeps.

Without CUDA every worker has a thread of its own. With CUDA one thread issues the ops of all lanes
that use the GPU, each lane's on a stream of its own; such an op is done when it is launched, and
CUDA events order streams and threads. Ops that block (host attention, disk) keep their threads.
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

SWITCH_INTERVAL = 5e-4  # seconds; Python's own is ten times as long
# Runs an op that became ready at a time; returns when it ran, unless that is the call's own time.
Run = Callable[[Op, float], Timing | None]


@dataclass(frozen=True)
class LaneWorker:
    """One thread's lanes, the number of cores that torch may use in it, and its CUDA streams."""

    lanes: tuple[Lane, ...]
    num_threads: int = 1
    streams: Mapping[Lane, torch.cuda.Stream] = field(default_factory=dict)


class IssuedOp:
    """An op in its lane's queue, with the number of ops it waits for and the ops that wait for it.

    ready_at: when the last op that it waited for ended; ended_at: when it ended (perf_counter).
    event: passed when the device has run the op, on a lane with a stream; there the op is done as
    soon as it is launched. event_waits: such events of the ops that it waited for.
    """

    __slots__ = (
        "dependents", "ended_at", "event", "event_waits", "index", "is_done", "lane", "num_pending",
        "op", "ready_at",
    )  # fmt: skip

    def __init__(self, index: int, op: Op) -> None:
        self.index = index
        self.op = op
        self.lane = op.lane
        self.num_pending = 0
        self.ready_at = self.ended_at = 0.0
        self.dependents: list[IssuedOp] = []
        self.is_done = False
        self.event: torch.cuda.Event | None = None
        self.event_waits: list[torch.cuda.Event] = []


class Lanes:
    """The lanes of one run; their threads start on entry and are joined on exit, whatever happens.

    cancel: called when the run stops, to end what ops under way may wait for.
    """

    def __init__(
        self,
        run: Run,
        workers: Iterable[LaneWorker],
        meter: Meter,
        cancel: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._meter = meter
        self._cancel = cancel
        self._lock = threading.Lock()
        self._queues: dict[Lane, deque[IssuedOp]] = {lane: deque() for lane in Lane}
        self._threads = [
            _LaneThread(worker, [self._queues[lane] for lane in worker.lanes]) for worker in workers
        ]
        self._thread_of = {lane: thread for thread in self._threads for lane in thread.worker.lanes}
        self._visit_ended = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._in_flight = 0
        self._resume_at = -1  # number of ops in flight at which the executor goes on issuing
        self._is_stopped = False
        self._error: BaseException | None = None
        self._num_threads = torch.get_num_threads()

    def issue(self, issued: IssuedOp, dependencies: Iterable[IssuedOp]) -> None:
        """Queue an op on its lane, to start when its dependencies, issued before, are done."""
        lane = issued.lane
        queue = self._queues[lane]
        with self._lock:
            self._in_flight += 1
            for other in dependencies:
                if other.lane is lane:
                    continue
                if not other.is_done:
                    other.dependents.append(issued)
                    issued.num_pending += 1
                    continue
                issued.ready_at = max(issued.ready_at, other.ended_at)
                if other.event is not None:
                    issued.event_waits.append(other.event)
            queue.append(issued)
            if not issued.num_pending and queue[0] is issued:
                self._thread_of[lane].wake()

    def wait(self, issued: IssuedOp) -> None:
        """Wait until an op that ends a visit is done; raises the error that ended the run."""
        with self._lock:
            self._visit_ended.wait_for(lambda: issued.is_done or self._is_stopped)
        if self._error is not None:
            raise self._error

    def wait_for_room(self, max_in_flight: int) -> None:
        """If max_in_flight ops are in flight, wait until only half of them are.

        Waiting for half, rather than for one, wakes the issuing thread less often.
        """
        if self._in_flight < max_in_flight:
            return
        with self._lock:
            self._resume_at = max_in_flight // 2
            self._room.wait_for(lambda: self._in_flight <= max_in_flight // 2 or self._is_stopped)
            self._resume_at = -1
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
        for thread in self._threads:
            for stream in thread.worker.streams.values():
                stream.synchronize()
        torch.set_num_threads(self._num_threads)
        sys.setswitchinterval(self._switch_interval)
        gc.unfreeze()

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
                    self._perform(issued, max(issued.ready_at, thread.ended_at))
                    thread.ended_at = issued.ended_at
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
                heads = [q[0] for q in thread.queues if q and not q[0].num_pending]
                if heads:
                    return min(heads, key=_issue_order) if len(heads) > 1 else heads[0]
                # Set with the lock held, so that the next op that becomes ready wakes this thread.
                thread.is_idle = True
            thread.sleep()

    def _perform(self, issued: IssuedOp, ready_at: float) -> None:
        """Run an op in this thread, from beginning to end."""
        for event in issued.event_waits:
            event.synchronize()
        timing = timed(self._run, issued.op, ready_at)
        issued.ended_at = timing.ended
        self._meter.note(issued.op, timing)

    def _launch(self, issued: IssuedOp, stream: torch.cuda.Stream) -> None:
        """Launch an op on its stream, behind the events of ops that it waits for."""
        for event in issued.event_waits:
            stream.wait_event(event)
        started = self._meter.mark(stream)
        self._run(issued.op, 0.0)
        issued.event = self._meter.mark(stream)
        self._meter.note_events(issued.op, started, issued.event)

    def _finish(self, issued: IssuedOp) -> None:
        """Take an op from its queue, and wake the threads whose next op waited for it alone."""
        with self._lock:
            self._queues[issued.lane].popleft()
            issued.is_done = True
            self._in_flight -= 1
            if self._in_flight == self._resume_at:
                self._room.notify()
            for other in issued.dependents:
                other.num_pending -= 1
                other.ready_at = max(other.ready_at, issued.ended_at)
                if issued.event is not None:
                    other.event_waits.append(issued.event)
                if not other.num_pending and self._queues[other.lane][0] is other:
                    self._thread_of[other.lane].wake()
            issued.dependents.clear()
            if issued.op.ends_visit:
                self._visit_ended.notify_all()


class _LaneThread:
    """The thread of a worker, with the queues of its lanes.

    It sleeps by acquiring `_wakeup`, a lock that is held whenever the thread is awake; a plain lock
    takes less time than a condition or an event.
    """

    def __init__(self, worker: LaneWorker, queues: list[deque[IssuedOp]]) -> None:
        self.worker = worker
        self.queues = queues
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


def _issue_order(issued: IssuedOp) -> int:
    return issued.index


# Workers whose lanes are CUDA streams, if the device is a GPU.
ON_STREAMS = frozenset(
    {Lane.DEVICE, Lane.LOAD_WEIGHTS, Lane.LOAD_CACHE, Lane.LOAD_SMALL, Lane.STORE}
)


def make_lane_workers(
    device: torch.device, cores: Cores, attends_by_torch: bool = False
) -> list[LaneWorker]:
    """Workers of a stage: one for each lane that has a worker; with CUDA one for all streams.

    Make them once a stage, not once a run: each stream that has multiplied keeps a workspace, and
    the memory that was freed on it.
    attends_by_torch: host attention runs on torch's threads; otherwise they would be in the way.
    """
    lanes_of = {worker: tuple(lane for lane in Lane if lane.worker is worker) for worker in Lane}
    lanes_of = {worker: lanes for worker, lanes in lanes_of.items() if lanes}
    threads = {Lane.DEVICE: cores.device, Lane.HOST: cores.host if attends_by_torch else 1}
    if device.type != "cuda":
        return [LaneWorker(lanes, threads.get(worker, 1)) for worker, lanes in lanes_of.items()]
    stream_of = {worker: torch.cuda.Stream(device) for worker in ON_STREAMS}
    streams = {lane: stream for worker, stream in stream_of.items() for lane in lanes_of[worker]}
    others = [
        LaneWorker(lanes, threads.get(worker, 1))
        for worker, lanes in lanes_of.items()
        if worker not in ON_STREAMS
    ]
    return [LaneWorker(tuple(streams), 1, streams), *others]


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

    Without host attention the device has all cores. With CUDA the device needs one core that
    launches its ops, and copies need another.
    """
    if on_cuda:
        return Cores(num_threads, num_threads, num_threads)
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
