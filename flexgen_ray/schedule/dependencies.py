"""Dependencies between ops, derived from the buffers that each op reads and writes.

No dependency is written down anywhere: `Dependencies` sees the ops in program order and finds the
hazards on each copy of each buffer, as an out-of-order processor does with registers. For example,
streamed weights are double-buffered, so layers 1 and 3 share a copy of DEVICE_WEIGHTS:

    op in program order         touches the copy   hazard: the op waits for
    LOAD_WEIGHTS layer 1, part 0     writes        -
    LOAD_WEIGHTS layer 1, part 1     writes        nothing: another part of the same content
    PROJECT      layer 1, batch 0    reads         RAW: both parts
    FINISH       layer 1, batch 1    reads         RAW: both parts
    LOAD_WEIGHTS layer 3, part 0     writes        WAR: the readers of layer 1; WAW: its writers
    LOAD_WEIGHTS layer 3, part 1     writes        the same ops as part 0
    PROJECT      layer 3, batch 0    reads         RAW: both parts of layer 3

Two ops of one lane need no dependency, since a lane runs its ops in order. So at most one reader
and one writer per lane are remembered for a copy, the latest.

Knows no tensors or bytes.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Generic, TypeVar

from flexgen_ray.schedule.ops import OPS, Buffer, Lane, Op, OpKind

# Ops are issued a little ahead of those that run; issued little by little, they disturb the lanes
# less.
VISITS_AHEAD = 1  # visits issued beyond the oldest one that has not ended
CELL_OPS = 16  # most ops of a cell; sparse attention may add three, a mixture two
CELLS_AHEAD = 4  # cells issued beyond those of one layer, by which its weights run ahead

Ticket = TypeVar("Ticket", bound=Hashable)
Slot = tuple[Buffer, int, int]  # one copy of a buffer; the two numbers depend on the buffer


def window_ops(num_batches: int) -> int:
    """Most ops of a stage that are issued and have not ended, for num_batches batches a block."""
    return CELL_OPS * (num_batches + CELLS_AHEAD)


class Dependencies(Generic[Ticket]):
    """Earlier ops that each op must wait for, beyond the order of its lane.

    Ops that write a copy with equal content (the parts of one layer's weights, the moves of one
    cell) and no reader between them fill different parts of the copy, so they don't wait for each
    other. A reader waits for all of them; the first writer of other content, and those who join it,
    wait for all of them and for all readers.
    """

    def __init__(self) -> None:
        self._slots: dict[Slot, _SlotState] = {}
        self._touched: dict[tuple, _Touched] = {}  # by Op.key, since ops recur in every visit

    def add(self, ticket: Ticket, op: Op) -> set[Ticket]:
        """Tickets of the earlier ops that this op must wait for; call in program order."""
        key = op.key
        touched = self._touched.get(key)
        if touched is None:
            touched = self._touched[key] = self._look_up(op)
        lane, read, written = touched
        waits: set = set()
        for state in read:
            waits.update(state.writers.values())  # read after write
            state.readers[lane] = ticket
        if written:
            content = _content(op)
            for state in written:
                state.admit_writer(ticket, lane, content)
                waits.update(state.released_by)  # write after read, and after write
        waits.discard(ticket)
        return waits

    def _look_up(self, op: Op) -> _Touched:
        read, written = (
            [self._slots.setdefault(slot, _SlotState()) for slot in slots]
            for slots in (reads(op), writes(op))
        )
        return op.lane, read, written


class _SlotState:
    """Present content of one slot: its writers and readers, and the ops that released the slot.

    released_by: the writers and readers of the content before, for which every writer of the
    present content waits. A lane runs its ops in order, so only the last op of each lane counts.
    """

    __slots__ = ("content", "readers", "released_by", "writers")

    def __init__(self) -> None:
        self.content: tuple[int, ...] = ()
        self.released_by: list = []
        self.writers: dict[Lane, Hashable] = {}
        self.readers: dict[Lane, Hashable] = {}

    def admit_writer(self, ticket: Hashable, lane: Lane, content: tuple[int, ...]) -> None:
        """Add a writer; the content is new if others have read the old one, or if it differs."""
        readers = self.readers
        if readers:
            # An op that reads and writes the slot is no hazard to itself.
            is_new = len(readers) > 1 or readers.get(lane) is not ticket
        else:
            is_new = False
        if is_new or content != self.content:
            self.released_by = [*readers.values(), *self.writers.values()]
            self.content, self.writers, self.readers = content, {}, {}
        self.writers[lane] = ticket


_Touched = tuple[Lane, list[_SlotState], list[_SlotState]]  # an op's lane, slots read and written


def _content(op: Op) -> tuple[int, ...]:
    """Identity of what a slot holds after this op; ops of equal content fill different parts."""
    if op.kind is OpKind.LOAD_WEIGHTS:
        return op.visit, op.layer
    if op.kind in (OpKind.LOAD_EXPERTS, OpKind.READ_EXPERTS):
        return op.visit, op.layer, op.group
    return op.visit, op.layer, op.batch


def reads(op: Op) -> tuple[Slot, ...]:
    """The slots that an op reads."""
    return tuple(_slot(buffer, *op.key[1:]) for buffer in OPS[op.kind].reads)


def writes(op: Op) -> tuple[Slot, ...]:
    """The slots that an op writes."""
    return tuple(_slot(buffer, *op.key[1:]) for buffer in OPS[op.kind].writes)


_PER_HIDDEN_SLOT = frozenset(
    {Buffer.HIDDEN_GPU, Buffer.HIDDEN_CPU, Buffer.HIDDEN_DISK, Buffer.SENT}
)
_PER_LAYER = frozenset({Buffer.CACHE_GPU, Buffer.CACHE_CPU, Buffer.CACHE_TAIL, Buffer.CACHE_DISK})


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
    experts: int,
) -> Slot:
    """The copy of `buffer` that an op touches; the arguments after it are those of Op.key."""
    if buffer is Buffer.DEVICE_WEIGHTS:
        return buffer, weights, 0
    if buffer is Buffer.DEVICE_EXPERTS:
        return buffer, experts, 0
    if buffer in (Buffer.HOST_WEIGHTS, Buffer.HOST_EXPERTS):
        return buffer, staging, 0
    if buffer is Buffer.ROUTED:
        return buffer, 0, 0
    if buffer in _PER_HIDDEN_SLOT:
        return buffer, hidden, 0
    if buffer in (Buffer.TOKENS, Buffer.PAGES):
        return buffer, batch, 0
    if buffer in _PER_LAYER:
        return buffer, layer, batch
    if buffer is Buffer.ROWS:
        return buffer, batch, turn
    return buffer, cell, 0
