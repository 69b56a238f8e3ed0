"""Runs a stream of ops: serially, as the oracle, or every lane at once, as people use it.

Both honour the same rule and give the same bits. Knows when an op may start; not what it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from flexgen_ray.runtime.lanes import LaneThreads
from flexgen_ray.schedule.ops import Dependencies, Lane, Op, OpKind

Handlers = Mapping[OpKind, Callable[[Op], None]]


class SerialExecutor:
    """One op after the other, in program order."""

    def __init__(self, handlers: Handlers, moves: Callable[[Op], bool]) -> None:
        self._handlers = handlers
        self._moves = moves

    def run(self, ops: Iterable[Op]) -> Iterator[Op]:
        """Yields each op that ends a visit when it is done; ops that move nothing are skipped."""
        for op in ops:
            if self._moves(op):
                self._handlers[op.kind](op)
                if op.ends_visit:
                    yield op


class AsyncExecutor:
    """Every lane in a thread of its own; what an op waits for, `Dependencies` says.

    threads: cores for the inside of one op, by lane; one where not given.
    """

    def __init__(
        self, handlers: Handlers, moves: Callable[[Op], bool], threads: Mapping[Lane, int]
    ) -> None:
        self._handlers = handlers
        self._moves = moves
        self._threads = threads

    def run(self, ops: Iterable[Op]) -> Iterator[Op]:
        """As SerialExecutor.run; the first exception in any lane ends the run, all threads joined.

        A visit is issued when the one before is over: only then is it known whether it comes.
        """
        flight = _InFlight(self._handlers)
        dependencies = Dependencies()
        with LaneThreads(flight, self._threads) as lanes:
            try:
                for index, op in enumerate(filter(self._moves, ops)):
                    waits = flight.register(index, op.lane, dependencies.of(index, op))
                    lanes.submit(index, op, waits)
                    if op.ends_visit:
                        flight.wait(index)
                        yield op
            except BaseException as error:
                flight.fail(error)
                raise
        flight.check()


class _InFlight:
    """The ops that were issued and are not over."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._lock = threading.Lock()
        self._events: dict[int, tuple[threading.Event, Lane]] = {}
        self._error: BaseException | None = None

    def register(self, index: int, lane: Lane, waits: set[int]) -> list[threading.Event]:
        """What op `index` must wait for beyond its lane's own order."""
        event = threading.Event()
        with self._lock:
            self._events[index] = event, lane
            if self._error is not None:
                event.set()
            found = [self._events[i] for i in waits if i in self._events]
        return [event for event, its_lane in found if its_lane is not lane]

    def execute(self, index: int, op: Op) -> None:
        """Runs the op, unless the run has failed, and releases those who wait for it."""
        if self._error is None:
            self._handlers[op.kind](op)
        with self._lock:
            event, _ = self._events.pop(index)
        event.set()

    def fail(self, error: BaseException) -> None:
        """Nobody waits any longer, and no other op is run."""
        with self._lock:
            self._error = self._error or error
            for event, _ in self._events.values():
                event.set()

    def wait(self, index: int) -> None:
        """Until op `index` is over; raises what ended the run, if something did."""
        with self._lock:
            found = self._events.get(index)
        if found:
            found[0].wait()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error
