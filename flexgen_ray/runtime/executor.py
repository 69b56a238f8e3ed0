"""Runs a stream of ops. The serial executor is the oracle for any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from flexgen_ray.schedule.ops import Op, OpKind


class SerialExecutor:
    """One op after the other, in program order."""

    def __init__(
        self, handlers: Mapping[OpKind, Callable[[Op], None]], moves: Callable[[Op], bool]
    ) -> None:
        self._handlers = handlers
        self._moves = moves

    def run(self, ops: Iterable[Op]) -> Iterator[Op]:
        """Yields each op when it is done; ops that can't move anything are not dispatched."""
        for op in ops:
            if self._moves(op):
                self._handlers[op.kind](op)
                yield op
