"""Plays ops in modelled time, by the rule that the executor and the emulation run them by.

An op starts when its lane is free and all that it waits for has ended; one worker serves both of
the device's lanes, the oldest op that may start first. Running ops share resources. Knows what ops
wait for and what they take; no plan, no rows.
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
    """A stage's ops in program order, only those that move something, and what each takes.

    window: as the executor's: how many are issued and not over. keeps_spans: they take memory.
    """

    ops: Iterable[Op]
    demand: Callable[[Op], Demand]
    window: int = sys.maxsize
    keeps_spans: bool = True


@dataclass(frozen=True)
class SimulatedRun:
    """A stage's run. seconds: until its last op ended; visit_ends: until each visit had; busy:
    {lane: seconds} that each lane's ops would take alone; spans: of each op, in the order of their
    ends, if they are kept.
    """

    seconds: float
    visit_ends: list[float]
    busy: dict[str, float]
    spans: list[Span]


def simulate(stream: OpStream) -> SimulatedRun:
    """One stage that is the whole model."""
    return simulate_ring([stream], 1)[0]


def simulate_ring(streams: list[OpStream], num_blocks: int) -> list[SimulatedRun]:
    """Stages joined to a ring, with so many blocks in flight.

    A batch has crossed the network when its SEND ends. RuntimeError if the ring waits for itself.
    """
    messages = _RingMessages(num_blocks)
    stages = [_SimulatedStage(number, stream, messages) for number, stream in enumerate(streams)]
    now = 0.0
    for stage in stages:
        stage.issue()
    while True:
        # What ends at once may let another stage start.
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
    """An op that was issued: how many ops it still waits for, and who waits for it."""

    __slots__ = ("dependents", "index", "is_done", "missing", "op", "post", "queue", "started")

    def __init__(self, index: int, op: Op, post: _Worker, demand: Demand) -> None:
        super().__init__(demand)
        self.index = index
        self.op = op
        self.post = post
        self.queue = post.queues[op.lane]
        self.missing = 0
        self.dependents: list[_SimulatedOp] = []
        self.is_done = False
        self.started = 0.0


class _Worker:
    """A worker: its lanes' queues, and whether it is at work."""

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.queues: dict[Lane, deque[_SimulatedOp]] = {lane: deque() for lane in lanes}
        self.is_busy = False

    def next(self) -> _SimulatedOp | None:
        """The oldest op that may start."""
        heads = [q[0] for q in self.queues.values() if q and not q[0].missing]
        return min(heads, key=lambda job: job.index) if heads else None


class _SimulatedStage:
    """One stage's lanes, its resources, and what has been issued of its stream."""

    def __init__(self, number: int, stream: OpStream, messages: _RingMessages) -> None:
        self.number = number
        self.resources: SharedResources[_SimulatedOp] = SharedResources()
        self._stream = stream
        self._ops = enumerate(stream.ops)
        self._messages = messages
        self._dependencies: Dependencies[_SimulatedOp] = Dependencies()
        posts = {it: _Worker(lane for lane in Lane if lane.worker is it) for it in Lane}
        self._post_of = {lane: posts[lane.worker] for lane in Lane}
        self._device = posts[Lane.DEVICE]
        self.touched: list[_Worker] = []
        self._in_flight = 0
        self._room = stream.window - 1
        self._last_ops: deque[_SimulatedOp] = deque()  # of the visits that aren't known to be over
        self._seconds = 0.0
        self._visit_ends: list[float] = []
        self._busy: dict[str, float] = defaultdict(float)
        self._spans: list[Span] = []

    @property
    def is_waiting(self) -> bool:
        return self._in_flight > 0

    def simulated(self) -> SimulatedRun:
        """What has been played so far."""
        return SimulatedRun(self._seconds, self._visit_ends, dict(self._busy), self._spans)

    def issue(self) -> None:
        """As many ops as the window takes; then none until half of it is over."""
        window, last_ops = self._stream.window, self._last_ops
        while self._in_flight <= self._room:
            while len(last_ops) > VISITS_AHEAD:
                if not last_ops[0].is_done:
                    return
                last_ops.popleft()
            index, op = next(self._ops, (0, None))
            if op is None:
                return
            self._queue(_SimulatedOp(index, op, self._post_of[op.lane], self._stream.demand(op)))
            self._room = window // 2 if self._in_flight >= window else window - 1

    def _queue(self, job: _SimulatedOp) -> None:
        queue = job.queue
        for other in self._dependencies.add(job, job.op):
            if not other.is_done and other.queue is not queue:
                other.dependents.append(job)
                job.missing += 1
        self._messages.await_message(self, job)
        job.queue.append(job)
        self._in_flight += 1
        self.touched.append(job.post)
        if job.op.ends_visit:
            self._last_ops.append(job)

    def start(self, now: float) -> bool:
        """All that may start; whether anything has also ended, for it takes no time."""
        has_ended = is_device = False
        while self.touched or is_device:
            # Only the device has a choice: it comes last, when all that is ready is known.
            if not self.touched:
                post, is_device = self._device, False
            elif (post := self.touched.pop()) is self._device:
                is_device = True
                continue
            job = None if post.is_busy else post.next()
            if job is None:
                continue
            job.started = now
            if job.demand.seconds:
                job.post.is_busy = True
                self.resources.begin(job, now)
            else:
                self._finish(job, now)
                has_ended = True
        return has_ended

    def end(self, now: float) -> None:
        """Of what is under way, all that is over now."""
        for job in self.resources.pop_ended(now):
            job.post.is_busy = False
            self._finish(job, now)

    def release(self, job: _SimulatedOp) -> None:
        """One of those that it waited for has ended."""
        job.missing -= 1
        if not job.missing:
            self.touched.append(job.post)

    def _finish(self, job: _SimulatedOp, now: float) -> None:
        op = job.op
        job.queue.popleft()
        job.is_done = True
        self._seconds = now
        self._busy[op.lane.worker.value] += job.demand.seconds
        if op.ends_visit:
            self._visit_ends.append(now)
        if self._stream.keeps_spans:
            self._spans.append(Span(op, job.started, now))
        for other in job.dependents:
            self.release(other)
        job.dependents.clear()
        self.touched.append(job.post)
        self._messages.send(self.number, op)
        self._in_flight -= 1
        if self._in_flight <= self._room:
            self.issue()


class _RingMessages:
    """Messages between stages that were told, and the ops that wait for others."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._sent: set[Message] = set()
        self._waiting: dict[Message, tuple[_SimulatedStage, _SimulatedOp]] = {}

    def await_message(self, stage: _SimulatedStage, job: _SimulatedOp) -> None:
        """The op waits for its message, if it is one that does."""
        message = awaited_message(stage.number, job.op, self._num_blocks)
        if message is not None and message not in self._sent:
            job.missing += 1
            self._waiting[message] = stage, job

    def send(self, number: int, op: Op) -> None:
        """What the end of an op of stage `number` lets others know."""
        message = sent_message(number, op, self._num_blocks)
        if message is None:
            return
        self._sent.add(message)
        if message in self._waiting:
            stage, job = self._waiting.pop(message)
            stage.release(job)
