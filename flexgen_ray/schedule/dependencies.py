"""Which op waits for which: derived from what each reads and writes, and decided nowhere else.

The memory that ops share: which buffers a kind reads and writes, and which copy of each.

Knows no tensor and no byte; what follows from it, dependencies.py says.

How far ahead ops are issued: little by little, they disturb the lanes less.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Generic, TypeVar

from flexgen_ray.schedule.ops import OPS, Buffer, Lane, Op, OpKind

VISITS_AHEAD = 1  # issued beyond the oldest that is not over
CELL_OPS = 16  # of a cell, at most; sparse attention may add three
CELLS_AHEAD = 4  # issued beyond a layer's, which its weights run ahead


def window_ops(num_batches: int) -> int:
    """Most ops of a stage that are issued and not over, for so many batches a block."""
    return CELL_OPS * (num_batches + CELLS_AHEAD)


_PER_HIDDEN_SLOT = frozenset(
    {Buffer.HIDDEN_GPU, Buffer.HIDDEN_CPU, Buffer.HIDDEN_DISK, Buffer.SENT}
)
_PER_LAYER = frozenset({Buffer.CACHE_GPU, Buffer.CACHE_CPU, Buffer.CACHE_TAIL, Buffer.CACHE_DISK})

Slot = tuple[Buffer, int, int]


def reads(op: Op) -> tuple[Slot, ...]:
    """The slots that an op reads."""
    return tuple(_slot(buffer, *op.key[1:]) for buffer in OPS[op.kind].reads)


def writes(op: Op) -> tuple[Slot, ...]:
    """The slots that an op writes."""
    return tuple(_slot(buffer, *op.key[1:]) for buffer in OPS[op.kind].writes)


@cache
def _slot(
    buffer: Buffer,
    layer: int,
    batch: int,
    cell: int,
    weights: int,
    hidden: int,
    turn: int,
    staging: int,
) -> Slot:
    """The copy of `buffer` that an op of these numbers touches."""
    if buffer is Buffer.DEVICE_WEIGHTS:
        return buffer, weights, 0
    if buffer is Buffer.HOST_WEIGHTS:
        return buffer, staging, 0
    if buffer in _PER_HIDDEN_SLOT:
        return buffer, hidden, 0
    if buffer is Buffer.TOKENS:
        return buffer, batch, 0
    if buffer in _PER_LAYER:
        return buffer, layer, batch
    if buffer is Buffer.ROWS:
        return buffer, batch, turn
    return buffer, cell, 0


Ticket = TypeVar("Ticket", bound=Hashable)


class Dependencies(Generic[Ticket]):
    """Which earlier ops each op must wait for, beyond its lane's order.

    Ops of one cell (for weights: of one layer) that write a slot with no reader between them fill
    different parts of it and don't wait for each other. A reader waits for all of them; whoever
    writes next waits for all of them and all readers.
    """

    def __init__(self) -> None:
        self._slots: dict[Slot, _SlotState] = {}
        self._touched: dict[tuple, _Touched] = {}

    def add(self, ticket: Ticket, op: Op) -> set[Ticket]:
        """Tickets of the earlier ops that this op must wait for; call in program order."""
        key = op.key
        touched = self._touched.get(key)
        if touched is None:
            touched = self._touched[key] = self._look_up(op)
        lane, read, written = touched
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

    def _look_up(self, op: Op) -> _Touched:
        read, written = (
            [self._slots.setdefault(slot, _SlotState()) for slot in slots]
            for slots in (reads(op), writes(op))
        )
        return op.lane, read, written


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


_Touched = tuple[Lane, list[_SlotState], list[_SlotState]]  # (lane, read, written)


def _content(op: Op) -> tuple[int, ...]:
    """What a slot holds after this op: ops of equal content fill different parts of it."""
    if op.kind is OpKind.LOAD_WEIGHTS:
        return op.visit, op.layer
    return op.visit, op.layer, op.batch
