"""Discrete-event simulation of a run: the executor's rules, in modelled time.

A worker that is free starts the op that is next by schedule/queueing.py, which the executor follows
too. Running ops share resources (resources.py), so an op's end moves whenever another begins or
ends.

The loop in `simulate_ring` has two steps. First start all that may start now: an op without demand
ends immediately, which may let others start, so this repeats until nothing changes. Then advance
the clock to the first event of the running ops, and end what ends at that time. An event is an end,
or a piece of a copy after which another copy has its turn.

On a GPU the device's two lanes have a stream each, so that ops that are ready on both run at once.
They share the GPU, which does the same work in the same time; here it does the oldest first. That
takes as long, or, where an op leaves much of the GPU idle, a few percent longer than two at once.

Knows dependencies and demands of ops; no plans or rows.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flexgen_ray.cost.resources import TIME_TOLERANCE, Demand, SharedResources
from flexgen_ray.schedule.dependencies import VISITS_AHEAD, Dependencies
from flexgen_ray.schedule.ops import Lane, Op, Span
from flexgen_ray.schedule.queueing import LaneQueues, QueuedOp
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
        events = [stage.resources.next_event() for stage in stages]
        now = min(events)
        if now == math.inf:
            break
        latest = now + TIME_TOLERANCE * now
        for stage, event in zip(stages, events, strict=True):
            if event <= latest:
                stage.end(now)
    if any(stage.is_waiting for stage in stages):
        raise RuntimeError(f"with {num_blocks} blocks, {len(stages)} stages wait for each other")
    return [stage.simulated() for stage in stages]


class _SimulatedOp(QueuedOp):
    """An issued op: its worker, its demand, and once it runs its start, its speed and its end."""

    __slots__ = ("demand", "ends", "left", "speed", "started", "worker")

    def __init__(self, index: int, op: Op, demand: Demand) -> None:
        super().__init__(index, op)
        self.worker = self.lane.worker
        self.demand = demand
        self.started = self.ends = self.left = 0.0
        self.speed = 1.0


class _SimulatedStage:
    """One stage: its workers, its resources, and the issued ops of its stream.

    touched: workers that have become free, or have an op that has become ready.
    """

    def __init__(self, number: int, stream: OpStream, messages: _RingMessages) -> None:
        self.number = number
        self.resources: SharedResources[_SimulatedOp] = SharedResources()
        self._stream = stream
        self._ops = enumerate(stream.ops)
        self._messages = messages
        self._dependencies: Dependencies[_SimulatedOp] = Dependencies()
        self._queues: LaneQueues[_SimulatedOp] = LaneQueues(stream.window)
        self._lanes_of = {it: [lane for lane in Lane if lane.worker is it] for it in Lane}
        self._busy_workers: set[Lane] = set()
        self.touched: list[Lane] = []
        self._last_ops: deque[_SimulatedOp] = deque()  # of visits that may not have ended
        self._seconds = 0.0
        self._visit_ends: list[float] = []
        self._busy: dict[str, float] = defaultdict(float)
        self._spans: list[Span] = []

    @property
    def is_waiting(self) -> bool:
        return self._queues.num_in_flight > 0

    def simulated(self) -> SimulatedRun:
        """Results so far."""
        return SimulatedRun(self._seconds, self._visit_ends, dict(self._busy), self._spans)

    def issue(self) -> None:
        """Issue ops until the window is full; once it is, none until half of it has ended."""
        last_ops = self._last_ops
        while not self._queues.is_full:
            while len(last_ops) > VISITS_AHEAD:
                if not last_ops[0].is_done:
                    return
                last_ops.popleft()
            index, op = next(self._ops, (0, None))
            if op is None:
                return
            issued = _SimulatedOp(index, op, self._stream.demand(op))
            self._messages.await_message(self, issued)
            if self._queues.add(issued, self._dependencies.add(issued, op)):
                self.touched.append(issued.worker)
            if op.ends_visit:
                last_ops.append(issued)

    def start(self, now: float) -> bool:
        """Start all ops that may start; return True if any of them took no time and has ended."""
        has_ended = is_device = False
        while self.touched or is_device:
            # The device comes last, when all ops that are ready are known, and takes the oldest.
            if not self.touched:
                worker, is_device = Lane.DEVICE, False
            elif (worker := self.touched.pop()) is Lane.DEVICE:
                is_device = True
                continue
            if worker in self._busy_workers:
                continue
            issued = self._queues.next(self._lanes_of[worker])
            if issued is None:
                continue
            issued.started = now
            if issued.demand.seconds:
                self._busy_workers.add(worker)
                self.resources.begin(issued, now)
            else:
                self._finish(issued, now)
                has_ended = True
        return has_ended

    def end(self, now: float) -> None:
        """End all running ops whose time is over, and change the turns of copies."""
        for issued in self.resources.pop_ended(now):
            self._busy_workers.remove(issued.worker)
            self._finish(issued, now)

    def release(self, issued: _SimulatedOp) -> None:
        """Count the message that `issued` waited for as arrived."""
        if self._queues.release(issued):
            self.touched.append(issued.worker)

    def _finish(self, issued: _SimulatedOp, now: float) -> None:
        op = issued.op
        self._seconds = now
        self._busy[issued.worker.value] += issued.demand.seconds
        if op.ends_visit:
            self._visit_ends.append(now)
        if self._stream.keeps_spans:
            self._spans.append(Span(op, issued.started, now))
        for other in self._queues.done(issued):
            self.touched.append(other.worker)
        self.touched.append(issued.worker)
        self._messages.send(self.number, op)
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
            issued.num_pending += 1
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
