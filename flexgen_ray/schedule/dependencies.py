"""Which op waits for which: derived from what each reads and writes, and decided nowhere else.

The memory that ops share: which buffers a kind reads and writes, and which copy of each.

Knows no tensor and no byte; what follows from it, dependencies.py says.

How far ahead ops are issued: little by little, they disturb the lanes less.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import StrEnum, auto
from functools import cache
from typing import Generic, TypeVar

from flexgen_ray.schedule.ops import LANE, Lane, Op, OpKind

VISITS_AHEAD = 1  # issued beyond the oldest that is not over
CELL_OPS = 16  # of a cell, at most; sparse attention may add three
CELLS_AHEAD = 4  # issued beyond a layer's, which its weights run ahead


def window_ops(num_batches: int) -> int:
    """Most ops of a stage that are issued and not over, for so many batches a block."""
    return CELL_OPS * (num_batches + CELLS_AHEAD)


class Buffer(StrEnum):
    """A piece of memory that ops share; `reads` and `writes` tell which copy an op touches."""

    __hash__ = str.__hash__  # Enum's own is Python, and these are looked up all the time

    DEVICE_WEIGHTS = auto()  # streamed weights; one copy per weights slot
    HOST_WEIGHTS = auto()  # a part of disk weights on its way; one copy per staging slot
    WORK = auto()  # hidden states of a cell on the device; the following per cell slot
    QUERY = auto()
    NEW_KV = auto()
    ATTENTION = auto()  # lies where the queries lay
    STREAMED_CACHE = auto()
    CHOICE = auto()  # which tokens streamed rows keep, told to the host too
    ARRIVED = auto()  # embeddings looked up, or hidden states received
    HOST_NEW_KV = auto()
    HOST_QUERY = auto()
    HOST_ATTENTION = auto()
    HOST_VALUES = auto()  # of the tokens kept
    HIDDEN_IN = auto()
    HIDDEN_OUT = auto()
    CACHE_IN = auto()
    CACHE_OUT = auto()
    LOGITS = auto()
    CHOSEN = auto()
    HIDDEN_GPU = auto()  # where hidden states live between layers; one copy per hidden slot
    HIDDEN_CPU = auto()
    HIDDEN_DISK = auto()
    SENT = auto()
    TOKENS = auto()  # per batch
    ROWS = auto()  # the composition of a pass; per batch and turn
    CACHE_GPU = auto()  # where keys and values live; per layer and batch
    CACHE_CPU = auto()
    CACHE_TAIL = auto()
    CACHE_DISK = auto()


_B = Buffer
READS: dict[OpKind, tuple[Buffer, ...]] = {
    OpKind.RECV_TOKENS: (_B.TOKENS,),
    OpKind.COMPOSE: (_B.TOKENS,),
    OpKind.RECV_ROWS: (),
    OpKind.RECV: (_B.ROWS,),
    OpKind.GATHER: (_B.ROWS,),
    OpKind.LOAD_EMBEDDING: (_B.ROWS, _B.ARRIVED),
    OpKind.EMBED: (_B.ROWS, _B.WORK),
    OpKind.READ_WEIGHTS: (),
    OpKind.LOAD_WEIGHTS: (_B.HOST_WEIGHTS,),
    OpKind.READ_HIDDEN: (_B.ROWS, _B.HIDDEN_DISK),
    OpKind.LOAD_HIDDEN: (_B.ROWS, _B.HIDDEN_CPU, _B.HIDDEN_IN),
    OpKind.READ_CACHE: (_B.ROWS, _B.CACHE_DISK),
    OpKind.LOAD_CACHE: (_B.ROWS, _B.CACHE_CPU, _B.CACHE_TAIL, _B.CACHE_IN),
    OpKind.PROJECT: (_B.ROWS, _B.DEVICE_WEIGHTS, _B.HIDDEN_GPU, _B.WORK),
    OpKind.STORE_CACHE: (_B.ROWS, _B.NEW_KV, _B.QUERY),
    OpKind.APPEND_CACHE: (_B.ROWS, _B.HOST_NEW_KV),
    OpKind.WRITE_CACHE: (_B.ROWS, _B.CACHE_OUT),
    OpKind.CHOOSE: (_B.ROWS, _B.QUERY, _B.NEW_KV, _B.STREAMED_CACHE),
    OpKind.GATHER_VALUES: (_B.ROWS, _B.CHOICE, _B.CACHE_CPU, _B.CACHE_TAIL, _B.CACHE_IN),
    OpKind.LOAD_VALUES: (_B.ROWS, _B.HOST_VALUES),
    OpKind.ATTEND_DEVICE: (
        _B.ROWS,
        _B.QUERY,
        _B.NEW_KV,
        _B.CACHE_GPU,
        _B.STREAMED_CACHE,
        _B.CHOICE,
    ),
    OpKind.ATTEND_HOST: (_B.ROWS, _B.HOST_QUERY, _B.CACHE_CPU),
    OpKind.LOAD_ATTENTION: (_B.ROWS, _B.HOST_ATTENTION),
    OpKind.FINISH: (_B.ROWS, _B.DEVICE_WEIGHTS, _B.WORK, _B.ATTENTION, _B.HIDDEN_GPU),
    OpKind.STORE_HIDDEN: (_B.ROWS, _B.WORK),
    OpKind.WRITE_HIDDEN: (_B.ROWS, _B.HIDDEN_OUT),
    OpKind.STORE_SENT: (_B.ROWS, _B.WORK),
    OpKind.SEND: (_B.ROWS, _B.SENT),
    OpKind.SAMPLE: (_B.ROWS, _B.LOGITS),
    OpKind.ACCEPT: (_B.ROWS, _B.CHOSEN, _B.TOKENS),
}
WRITES: dict[OpKind, tuple[Buffer, ...]] = {
    OpKind.RECV_TOKENS: (_B.TOKENS,),
    OpKind.COMPOSE: (_B.ROWS, _B.TOKENS),
    OpKind.RECV_ROWS: (_B.ROWS,),
    OpKind.RECV: (_B.ARRIVED,),
    OpKind.GATHER: (_B.ARRIVED,),
    OpKind.LOAD_EMBEDDING: (_B.WORK,),
    OpKind.EMBED: (_B.WORK, _B.HIDDEN_GPU),
    OpKind.READ_WEIGHTS: (_B.HOST_WEIGHTS,),
    OpKind.LOAD_WEIGHTS: (_B.DEVICE_WEIGHTS,),
    OpKind.READ_HIDDEN: (_B.HIDDEN_IN,),
    OpKind.LOAD_HIDDEN: (_B.WORK,),
    OpKind.READ_CACHE: (_B.CACHE_IN,),
    OpKind.LOAD_CACHE: (_B.STREAMED_CACHE,),
    OpKind.PROJECT: (_B.WORK, _B.QUERY, _B.ATTENTION, _B.NEW_KV, _B.CACHE_GPU),
    OpKind.STORE_CACHE: (_B.HOST_NEW_KV, _B.HOST_QUERY),
    OpKind.APPEND_CACHE: (_B.CACHE_CPU, _B.CACHE_TAIL, _B.CACHE_OUT),
    OpKind.WRITE_CACHE: (_B.CACHE_DISK,),
    OpKind.CHOOSE: (_B.STREAMED_CACHE, _B.CHOICE),
    OpKind.GATHER_VALUES: (_B.HOST_VALUES,),
    OpKind.LOAD_VALUES: (_B.STREAMED_CACHE,),
    OpKind.ATTEND_DEVICE: (_B.ATTENTION, _B.STREAMED_CACHE),
    OpKind.ATTEND_HOST: (_B.HOST_ATTENTION,),
    OpKind.LOAD_ATTENTION: (_B.ATTENTION,),
    OpKind.FINISH: (_B.WORK, _B.HIDDEN_GPU, _B.LOGITS),
    OpKind.STORE_HIDDEN: (_B.HIDDEN_CPU, _B.HIDDEN_OUT),
    OpKind.WRITE_HIDDEN: (_B.HIDDEN_DISK,),
    OpKind.STORE_SENT: (_B.SENT,),
    OpKind.SEND: (),
    OpKind.SAMPLE: (_B.CHOSEN,),
    OpKind.ACCEPT: (_B.TOKENS,),
}

_PER_HIDDEN_SLOT = frozenset({_B.HIDDEN_GPU, _B.HIDDEN_CPU, _B.HIDDEN_DISK, _B.SENT})
_PER_LAYER = frozenset({_B.CACHE_GPU, _B.CACHE_CPU, _B.CACHE_TAIL, _B.CACHE_DISK})

Slot = tuple[Buffer, int, int]


def reads(op: Op) -> tuple[Slot, ...]:
    """The slots that an op reads."""
    return tuple(_slot(buffer, *op.key[1:]) for buffer in READS[op.kind])


def writes(op: Op) -> tuple[Slot, ...]:
    """The slots that an op writes."""
    return tuple(_slot(buffer, *op.key[1:]) for buffer in WRITES[op.kind])


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
