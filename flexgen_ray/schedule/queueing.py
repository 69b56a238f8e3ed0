"""Queues of the lanes: the one rule of which op starts next, for the executor and the simulation.

Each lane has a first-in-first-out queue. An op may start when it is at the head of its queue and
all that it waits for is done; of several such ops, a worker takes the oldest. The life of an op,
say op 17 on lane `store`, which waits for ops 3 and 12 of other lanes:

    add(17)    appends it to the queue of its lane, enters it in the lists `dependents` of ops 3 and
               12, and sets num_pending to 2. An op that is done already isn't waited for. Ops of
               the same lane need no entry: a lane's queue is in order.
    done(3)    lowers num_pending to 1.
    done(12)   lowers it to 0. If op 17 is at the head of its queue, it is returned: it may start.
    next       returns it to the worker of `store`, once no older op of that worker may start.
    done(17)   removes it from its queue, and does for op 17's dependents what was done for it.

Knows neither threads nor time, nor why one op waits for another (dependencies.py does).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from flexgen_ray.schedule.ops import Lane, Op


class QueuedOp:
    """An op in its lane's queue, with the number of ops it waits for and the ops that wait for it.

    index: its place in program order. num_pending: to be raised before `LaneQueues.add` if the op
    waits for something else too, which `LaneQueues.release` counts as done.
    """

    __slots__ = ("dependents", "index", "is_done", "lane", "num_pending", "op")

    def __init__(self, index: int, op: Op) -> None:
        self.index = index
        self.op = op
        self.lane = op.lane
        self.num_pending = 0
        self.dependents: list = []
        self.is_done = False


QueuedOpT = TypeVar("QueuedOpT", bound=QueuedOp)


class LaneQueues(Generic[QueuedOpT]):
    """The ops that have been added and are not done.

    window: most such ops. is_full: the window has filled up, and has not halved since; add no op
    then. Waiting for half, rather than for one op, wakes the thread that adds ops less often.
    """

    def __init__(self, window: int = sys.maxsize) -> None:
        self._queues: dict[Lane, deque[QueuedOpT]] = {lane: deque() for lane in Lane}
        self._window = window
        self.num_in_flight = 0
        self.is_full = False

    def add(self, queued: QueuedOpT, waits_for: Iterable[QueuedOpT]) -> bool:
        """Queue an op, in program order; True if it may start now."""
        lane = queued.lane
        for other in waits_for:
            if not other.is_done and other.lane is not lane:
                other.dependents.append(queued)
                queued.num_pending += 1
        queue = self._queues[lane]
        queue.append(queued)
        self.num_in_flight += 1
        if self.num_in_flight >= self._window:
            self.is_full = True
        return not queued.num_pending and queue[0] is queued

    def next(self, lanes: Iterable[Lane]) -> QueuedOpT | None:
        """The oldest op that may start on one of a worker's lanes; it stays queued until done."""
        oldest = None
        for lane in lanes:
            if queue := self._queues[lane]:
                head = queue[0]
                if not head.num_pending and (oldest is None or head.index < oldest.index):
                    oldest = head
        return oldest

    def done(self, queued: QueuedOpT) -> list[QueuedOpT]:
        """Take an op that has run from its queue; return the ops of other lanes that may start."""
        self._queues[queued.lane].popleft()
        queued.is_done = True
        self.num_in_flight -= 1
        if self.num_in_flight <= self._window // 2:
            self.is_full = False
        ready = [other for other in queued.dependents if self.release(other)]
        queued.dependents.clear()
        return ready

    def release(self, queued: QueuedOpT) -> bool:
        """Count one of the things that an op waits for as done; True if the op may start now."""
        queued.num_pending -= 1
        return not queued.num_pending and self._queues[queued.lane][0] is queued
