"""Execution of a stream of ops: serially, as the reference, or on all lanes at once, as in use.

Both obey the same dependencies and give the same bits. Knows when an op may start; not what it
does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable

from flexgen_ray.runtime.lanes import IssuedOp, Lanes, LaneWorker, Run, timed
from flexgen_ray.runtime.meter import Meter, Timing
from flexgen_ray.schedule.dependencies import VISITS_AHEAD, Dependencies
from flexgen_ray.schedule.ops import Op


class SerialExecutor:
    """Runs one op after the other, in program order.

    run: runs an op; is_active: False for ops that have no work in this stage, and are skipped.
    wait: returns when the device has run all ops launched; None if it needs no waiting.
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
        """Run the ops, and yield each op that ends a visit when it is done."""
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
    """Runs ops on all lanes at once; `Dependencies` says which ops an op waits for.

    cancel: called when the run stops early, to end what ops under way may wait for.
    max_in_flight: most ops that are issued and not done; issuing a few at a time disturbs the
    lanes less. Other arguments as for SerialExecutor.
    """

    def __init__(
        self,
        run: Run,
        is_active: Callable[[Op], bool],
        workers: Iterable[LaneWorker],
        meter: Meter | None = None,
        cancel: Callable[[], None] | None = None,
        max_in_flight: int = 256,
    ) -> None:
        self._run = run
        self._is_active = is_active
        self._workers = workers
        self._meter = meter or Meter()
        self._cancel = cancel
        self._max_in_flight = max_in_flight

    def run(self, ops: Iterable[Op]) -> Generator[Op]:
        """Run the ops, and yield each op that ends a visit when it is done.

        Ops of a visit are issued while those of the visit before run, and start as soon as their
        dependencies allow. The first exception in any lane ends the run, with all threads joined.
        """
        dependencies: Dependencies[IssuedOp] = Dependencies()
        ends: deque[IssuedOp] = deque()
        window = self._max_in_flight
        with Lanes(self._run, self._workers, self._meter, window, self._cancel) as lanes:
            for index, op in enumerate(filter(self._is_active, ops)):
                issued = IssuedOp(index, op)
                lanes.issue(issued, dependencies.add(issued, op))
                lanes.wait_for_room()
                if op.ends_visit:
                    ends.append(issued)
                # Yield a visit's end early, even if the next visit is not yet issued completely.
                while len(ends) > VISITS_AHEAD or (ends and ends[0].is_done):
                    lanes.wait(ends[0])
                    yield ends.popleft().op
            for issued in ends:
                lanes.wait(issued)
                yield issued.op
