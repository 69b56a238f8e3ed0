"""Runs a stream of ops: serially, as the oracle, or every lane at once, as people use it.

Both honour the same rule and give the same bits. Knows when an op may start; not what it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable

from flexgen_ray.runtime.lanes import IssuedOp, Lanes, LaneWorker, Run, timed
from flexgen_ray.runtime.meter import Meter, Timing
from flexgen_ray.schedule.dependencies import VISITS_AHEAD, Dependencies
from flexgen_ray.schedule.ops import Op


class SerialExecutor:
    """One op after the other, in program order.

    wait: returns when the device has done what an op has only launched.
    """

    def __init__(
        self,
        run: Run,
        is_active: Callable[[Op], bool],
        meter: Meter | None = None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self._is_active = is_active
        self._meter = meter or Meter()
        self._wait = wait

    def run(self, ops: Iterable[Op]) -> Generator[Op]:
        """Yields each op that ends a visit when it is done; ops without work are skipped."""
        ended = 0.0
        for op in ops:
            if self._is_active(op):
                timing = timed(self._run_whole, op, ended)
                ended = timing.ended
                self._meter.note(op, timing)
                if op.ends_visit:
                    yield op

    def _run_whole(self, op: Op, ready_at: float) -> Timing | None:
        timing = self._run(op, ready_at)
        if self._wait is not None:
            self._wait()
        return timing


class AsyncExecutor:
    """Every lane at once; what an op waits for, `Dependencies` says.

    cancel: called when the run stops early, to end what ops under way may wait for. window: ops
    issued and not over; issued little by little, they disturb the lanes less.
    """

    def __init__(
        self,
        run: Run,
        is_active: Callable[[Op], bool],
        crews: Iterable[LaneWorker],
        meter: Meter | None = None,
        cancel: Callable[[], None] | None = None,
        window: int = 256,
    ) -> None:
        self._run = run
        self._is_active = is_active
        self._crews = crews
        self._meter = meter or Meter()
        self._cancel = cancel
        self._window = window

    def run(self, ops: Iterable[Op]) -> Generator[Op]:
        """As SerialExecutor.run; the first exception in any lane ends the run, all threads joined.

        A visit is issued while the one before runs, and runs as far as what it waits for allows.
        """
        dependencies: Dependencies[IssuedOp] = Dependencies()
        ends: deque[IssuedOp] = deque()
        with Lanes(self._run, self._crews, self._meter, self._cancel) as lanes:
            for index, op in enumerate(filter(self._is_active, ops)):
                ticket = IssuedOp(index, op)
                lanes.issue(ticket, dependencies.add(ticket, op))
                lanes.wait_for_room(self._window)
                if op.ends_visit:
                    ends.append(ticket)
                # Told as soon as it is over, though the next visit isn't issued wholly yet.
                while len(ends) > VISITS_AHEAD or (ends and ends[0].is_done):
                    lanes.wait(ends[0])
                    yield ends.popleft().op
            for ticket in ends:
                lanes.wait(ticket)
                yield ticket.op
        self._meter.settle()
