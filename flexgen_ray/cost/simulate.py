"""Discrete-event simulation of a run: the executor's rules, in modelled time.

An op starts when its worker is free and all ops that it waits for have ended. A worker serves one
or two lanes, each in order; of two ops that may start, the older one does. Running ops share
resources (resources.py), so an op's end moves whenever another begins or ends.

The loop in `simulate_ring` has two steps. First start all that may start now: an op without demand
ends immediately, which may let others start, so this repeats until nothing changes. Then advance
the clock to the first end among the running ops, and end what ends at that time.

Knows dependencies and demands of ops; no plans or rows.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flexgen_ray.cost.resources import TIME_TOLERANCE, Demand, RunningOp, SharedResources
from flexgen_ray.schedule.dependencies import VISITS_AHEAD, Dependencies
from flexgen_ray.schedule.ops import Lane, Op, Span
from flexgen_ray.schedule.ring import Message, awaited_message, sent_message


@dataclass(frozen=True)
class OpStream:
    """Ops of a stage in program order, only those that have work, and the demand of each.

    window: most ops that are issued and have not ended, as in the executor. keeps_spans: False
    saves the memory of the spans.
    """

    ops: Iterable[Op]
    demand: Callable[[Op], Demand]
    window: int = sys.maxsize
    keeps_spans: bool = True


@dataclass(frozen=True)
class SimulatedRun:
    """Times of a simulated stage, in seconds since the run began.

    seconds: end of the last op; visit_ends: end of each visit; busy: {lane: seconds} that the
    lane's ops would take if each ran alone; spans: one per op, in order of their ends, or none.
    """

    seconds: float
    visit_ends: list[float]
    busy: dict[str, float]
    spans: list[Span]


def simulate(stream: OpStream) -> SimulatedRun:
    """Simulate one stage that is the whole model."""
    return simulate_ring([stream], 1)[0]


def simulate_ring(streams: list[OpStream], num_blocks: int) -> list[SimulatedRun]:
    """Simulate stages that form a ring, with num_blocks blocks in flight.

    A batch has crossed the network when its SEND ends. Raises RuntimeError on a deadlock.
    """
    messages = _RingMessages(num_blocks)
    stages = [_SimulatedStage(number, stream, messages) for number, stream in enumerate(streams)]
    now = 0.0
    for stage in stages:
        stage.issue()
    while True:
        # An op that takes no time ends here, and its message may let another stage start.
        while any([stage.start(now) for stage in stages if stage.touched]):
            pass
        ends = [stage.resources.next_end() for stage in stages]
        now = min(ends)
        if now == math.inf:
            break
        latest = now + TIME_TOLERANCE * now
        for stage, end in zip(stages, ends, strict=True):
            if end <= latest:
                stage.end(now)
    if any(stage.is_waiting for stage in stages):
        raise RuntimeError(f"with {num_blocks} blocks, {len(stages)} stages wait for each other")
    return [stage.simulated() for stage in stages]


class _SimulatedOp(RunningOp):
    """An issued op.

    missing: number of ops and messages that it still waits for. dependents: ops that wait for it.
    """

    __slots__ = ("dependents", "index", "is_done", "missing", "op", "queue", "started", "worker")

    def __init__(self, index: int, op: Op, worker: _Worker, demand: Demand) -> None:
        super().__init__(demand)
        self.index = index
        self.op = op
        self.worker = worker
        self.queue = worker.queues[op.lane]
        self.missing = 0
        self.dependents: list[_SimulatedOp] = []
        self.is_done = False
        self.started = 0.0


class _Worker:
    """The queues of the lanes that one worker serves, and whether the worker is busy."""

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.queues: dict[Lane, deque[_SimulatedOp]] = {lane: deque() for lane in lanes}
        self.is_busy = False

    def next(self) -> _SimulatedOp | None:
        """The oldest op that may start, among the heads of the queues."""
        heads = [q[0] for q in self.queues.values() if q and not q[0].missing]
        return min(heads, key=lambda issued: issued.index) if heads else None


class _SimulatedStage:
    """One stage: its workers, its resources, and the issued ops of its stream.

    touched: workers for which something changed, so that an op of theirs may be able to start.
    """

    def __init__(self, number: int, stream: OpStream, messages: _RingMessages) -> None:
        self.number = number
        self.resources: SharedResources[_SimulatedOp] = SharedResources()
        self._stream = stream
        self._ops = enumerate(stream.ops)
        self._messages = messages
        self._dependencies: Dependencies[_SimulatedOp] = Dependencies()
        workers = {it: _Worker(lane for lane in Lane if lane.worker is it) for it in Lane}
        self._worker_of = {lane: workers[lane.worker] for lane in Lane}
        self._device = workers[Lane.DEVICE]
        self.touched: list[_Worker] = []
        self._in_flight = 0
        self._room = stream.window - 1
        self._last_ops: deque[_SimulatedOp] = deque()  # of visits that may not have ended
        self._seconds = 0.0
        self._visit_ends: list[float] = []
        self._busy: dict[str, float] = defaultdict(float)
        self._spans: list[Span] = []

    @property
    def is_waiting(self) -> bool:
        return self._in_flight > 0

    def simulated(self) -> SimulatedRun:
        """Results so far."""
        return SimulatedRun(self._seconds, self._visit_ends, dict(self._busy), self._spans)

    def issue(self) -> None:
        """Issue ops until the window is full; once it is, none until half of it has ended."""
        window, last_ops = self._stream.window, self._last_ops
        while self._in_flight <= self._room:
            while len(last_ops) > VISITS_AHEAD:
                if not last_ops[0].is_done:
                    return
                last_ops.popleft()
            index, op = next(self._ops, (0, None))
            if op is None:
                return
            self._queue(_SimulatedOp(index, op, self._worker_of[op.lane], self._stream.demand(op)))
            self._room = window // 2 if self._in_flight >= window else window - 1

    def _queue(self, issued: _SimulatedOp) -> None:
        queue = issued.queue
        for other in self._dependencies.add(issued, issued.op):
            if not other.is_done and other.queue is not queue:
                other.dependents.append(issued)
                issued.missing += 1
        self._messages.await_message(self, issued)
        issued.queue.append(issued)
        self._in_flight += 1
        self.touched.append(issued.worker)
        if issued.op.ends_visit:
            self._last_ops.append(issued)

    def start(self, now: float) -> bool:
        """Start all ops that may start; return True if any of them took no time and has ended."""
        has_ended = is_device = False
        while self.touched or is_device:
            # The device comes last, when all ops that are ready are known, and takes the oldest.
            if not self.touched:
                worker, is_device = self._device, False
            elif (worker := self.touched.pop()) is self._device:
                is_device = True
                continue
            issued = None if worker.is_busy else worker.next()
            if issued is None:
                continue
            issued.started = now
            if issued.demand.seconds:
                issued.worker.is_busy = True
                self.resources.begin(issued, now)
            else:
                self._finish(issued, now)
                has_ended = True
        return has_ended

    def end(self, now: float) -> None:
        """End all running ops whose time is over."""
        for issued in self.resources.pop_ended(now):
            issued.worker.is_busy = False
            self._finish(issued, now)

    def release(self, issued: _SimulatedOp) -> None:
        """Count an op or message that `issued` waited for as done."""
        issued.missing -= 1
        if not issued.missing:
            self.touched.append(issued.worker)

    def _finish(self, issued: _SimulatedOp, now: float) -> None:
        op = issued.op
        issued.queue.popleft()
        issued.is_done = True
        self._seconds = now
        self._busy[op.lane.worker.value] += issued.demand.seconds
        if op.ends_visit:
            self._visit_ends.append(now)
        if self._stream.keeps_spans:
            self._spans.append(Span(op, issued.started, now))
        for other in issued.dependents:
            self.release(other)
        issued.dependents.clear()
        self.touched.append(issued.worker)
        self._messages.send(self.number, op)
        self._in_flight -= 1
        if self._in_flight <= self._room:
            self.issue()


class _RingMessages:
    """Messages that stages of the ring have sent, and the ops that wait for one."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._sent: set[Message] = set()
        self._waiting: dict[Message, tuple[_SimulatedStage, _SimulatedOp]] = {}

    def await_message(self, stage: _SimulatedStage, issued: _SimulatedOp) -> None:
        """Let an op wait for its message, if it needs one that has not been sent."""
        message = awaited_message(stage.number, issued.op, self._num_blocks)
        if message is not None and message not in self._sent:
            issued.missing += 1
            self._waiting[message] = stage, issued

    def send(self, number: int, op: Op) -> None:
        """Send the message, if any, of an op of stage `number` that has ended."""
        message = sent_message(number, op, self._num_blocks)
        if message is None:
            return
        self._sent.add(message)
        if message in self._waiting:
            stage, issued = self._waiting.pop(message)
            stage.release(issued)
