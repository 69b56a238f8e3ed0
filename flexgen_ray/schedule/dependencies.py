"""Which op waits for which: derived from what each reads and writes, and decided nowhere else."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from flexgen_ray.schedule.buffers import Slot, reads, writes
from flexgen_ray.schedule.ops import LANE, Lane, Op, OpKind

Ticket = TypeVar("Ticket", bound=Hashable)


class Dependencies(Generic[Ticket]):
    """Which earlier ops each op must wait for, beyond its lane's order.

    Ops of one cell (for weights: of one layer) that write a slot with no reader between them fill
    different parts of it and don't wait for each other. A reader waits for all of them; whoever
    writes next waits for all of them and all readers.
    """

    def __init__(self) -> None:
        self._slots: dict[Slot, _SlotState] = {}
        self._touched: dict[tuple, tuple[list[_SlotState], list[_SlotState]]] = {}

    def of(self, ticket: Ticket, op: Op) -> set[Ticket]:
        """Tickets of the ops that this one waits for; call in program order."""
        lane = LANE[op.kind]
        touched = self._touched.get(op.key)
        if touched is None:
            touched = self._touched[op.key] = self._states(op)
        read, written = touched
        waits: set = set()
        for state in read:
            waits.update(state.writers.values())
            state.readers[lane] = ticket
        if written:
            content = _content(op)
            for state in written:
                state.admit_writer(ticket, lane, content)
                waits.update(state.released_by)
        waits.discard(ticket)
        return waits

    def _states(self, op: Op) -> tuple[list[_SlotState], list[_SlotState]]:
        read, written = (
            [self._slots.setdefault(slot, _SlotState()) for slot in slots]
            for slots in (reads(op), writes(op))
        )
        return read, written


class _SlotState:
    """One slot's present content: who writes it, who reads it, who had to let go of the last.

    A lane runs its ops in order, so of each lane only the last one counts.
    """

    __slots__ = ("content", "readers", "released_by", "writers")

    def __init__(self) -> None:
        self.content: tuple[int, ...] = ()
        self.released_by: list = []
        self.writers: dict[Lane, Hashable] = {}
        self.readers: dict[Lane, Hashable] = {}

    def admit_writer(self, ticket: Hashable, lane: Lane, content: tuple[int, ...]) -> None:
        readers = self.readers
        if readers:
            # What it reads itself, it may overwrite.
            is_new = len(readers) > 1 or readers.get(lane) is not ticket
        else:
            is_new = False
        if is_new or content != self.content:
            self.released_by = [*readers.values(), *self.writers.values()]
            self.content, self.writers, self.readers = content, {}, {}
        self.writers[lane] = ticket


def _content(op: Op) -> tuple[int, ...]:
    """What a slot holds after this op: ops of equal content fill different parts of it."""
    if op.kind is OpKind.LOAD_WEIGHTS:
        return op.visit, op.layer
    if op.kind is OpKind.READ_WEIGHTS:
        return op.visit, op.layer, op.part
    return op.visit, op.layer, op.batch
