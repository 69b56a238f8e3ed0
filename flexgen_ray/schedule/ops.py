"""The vocabulary of the schedule: op kinds, the lane each is issued on, the buffers each touches.

Program order is a correct serial execution. Any other must respect the hazards that the tables
below imply (schedule/dependencies.py). Knows no tensor, no byte and no second.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto
from functools import cache

CELL_SLOTS = 2  # double buffering: one slot is filled while the other is used
LAYER_SLOTS = 2
HEAD_SLOT = 2  # its own, so that the next visit's first layer can arrive while this one ends
WEIGHTS_SLOTS = 3


def staging_slots(num_batches: int) -> int:
    """Parts of disk weights that host memory has room for: one read, one loaded, one between."""
    return min(3, num_batches + 1)


class OpKind(StrEnum):
    """What one op does; see docs/design.md for the cell they form."""

    COMPOSE = auto()  # which rows this pass of a batch has
    GATHER = auto()  # embedding rows looked up on the host
    LOAD_EMBEDDING = auto()  # the gathered rows, to the device
    READ_WEIGHTS = auto()  # part of a coming layer's disk weights, into a host slot
    LOAD_WEIGHTS = auto()  # part of the next layer's streamed weights, to the device
    READ_HIDDEN = auto()  # hidden states on disk, into a host slot
    LOAD_HIDDEN = auto()  # hidden states off the device, to the device
    READ_CACHE = auto()  # cache blocks on disk, into a host slot
    LOAD_CACHE = auto()  # rows that are streamed to the device to be attended there
    PROJECT = auto()  # norm, QKV, positions, append to the device-resident cache
    STORE_CACHE = auto()  # new keys and values off the device, queries of host-attended rows
    APPEND_CACHE = auto()  # those keys and values, to the rows' homes in host memory
    WRITE_CACHE = auto()  # whole cache blocks, to disk
    ATTEND_DEVICE = auto()  # rows on, or streamed to, the device
    ATTEND_HOST = auto()  # rows attended where their cache lies
    LOAD_ATTENTION = auto()  # results of ATTEND_HOST, to the device
    FINISH = auto()  # output projection and MLP; the embedding; the logits
    STORE_HIDDEN = auto()  # hidden states that live off the device
    WRITE_HIDDEN = auto()  # hidden states that live on disk
    SAMPLE = auto()  # next tokens of a batch, chosen on the device
    ACCEPT = auto()  # the same tokens, taken note of on the host


class Lane(StrEnum):
    """A first-in-first-out queue; lanes only order, resources are scarce."""

    DEVICE = auto()
    DEVICE_AHEAD = auto()  # the device too: what is begun ahead may wait without holding it up
    HOST = auto()
    LOAD_WEIGHTS = auto()
    LOAD_CACHE = auto()
    LOAD_SMALL = auto()
    STORE = auto()
    DISK_READ = auto()
    DISK_WRITE = auto()

    @property
    def worker(self) -> Lane:
        """The lane that stands for both of the device's: one thread or stream serves them."""
        return Lane.DEVICE if self is Lane.DEVICE_AHEAD else self


LANE: dict[OpKind, Lane] = {
    OpKind.COMPOSE: Lane.HOST,
    OpKind.GATHER: Lane.HOST,
    OpKind.LOAD_EMBEDDING: Lane.LOAD_SMALL,
    OpKind.READ_WEIGHTS: Lane.DISK_READ,
    OpKind.LOAD_WEIGHTS: Lane.LOAD_WEIGHTS,
    OpKind.READ_HIDDEN: Lane.DISK_READ,
    OpKind.LOAD_HIDDEN: Lane.LOAD_SMALL,
    OpKind.READ_CACHE: Lane.DISK_READ,
    OpKind.LOAD_CACHE: Lane.LOAD_CACHE,
    OpKind.PROJECT: Lane.DEVICE_AHEAD,
    OpKind.STORE_CACHE: Lane.STORE,
    OpKind.APPEND_CACHE: Lane.HOST,
    OpKind.WRITE_CACHE: Lane.DISK_WRITE,
    OpKind.ATTEND_DEVICE: Lane.DEVICE_AHEAD,
    OpKind.ATTEND_HOST: Lane.HOST,
    OpKind.LOAD_ATTENTION: Lane.LOAD_SMALL,
    OpKind.FINISH: Lane.DEVICE,
    OpKind.STORE_HIDDEN: Lane.STORE,
    OpKind.WRITE_HIDDEN: Lane.DISK_WRITE,
    OpKind.SAMPLE: Lane.DEVICE,
    OpKind.ACCEPT: Lane.HOST,
}


class Buffer(StrEnum):
    """A piece of memory that ops share; `Op.slot_of` tells which copy of it an op touches."""

    DEVICE_WEIGHTS = auto()  # streamed weights; one copy per weights slot
    HOST_WEIGHTS = auto()  # a part of disk weights on its way; one copy per staging slot
    WORK = auto()  # hidden states of a cell on the device; the following per cell slot
    QUERY = auto()
    NEW_KV = auto()
    ATTENTION = auto()  # lies where the queries lay
    STREAMED_CACHE = auto()
    GATHERED = auto()
    HOST_NEW_KV = auto()
    HOST_QUERY = auto()
    HOST_ATTENTION = auto()
    HIDDEN_IN = auto()
    HIDDEN_OUT = auto()
    CACHE_IN = auto()
    CACHE_OUT = auto()
    LOGITS = auto()
    CHOSEN = auto()
    HIDDEN_GPU = auto()  # where hidden states live between layers; one copy per batch
    HIDDEN_CPU = auto()
    HIDDEN_DISK = auto()
    TOKENS = auto()
    ROWS = auto()  # the composition of a pass; per batch and parity of the visit
    CACHE_GPU = auto()  # where keys and values live; per layer and batch
    CACHE_CPU = auto()
    CACHE_TAIL = auto()
    CACHE_DISK = auto()


_B = Buffer
READS: dict[OpKind, tuple[Buffer, ...]] = {
    OpKind.COMPOSE: (_B.TOKENS,),
    OpKind.GATHER: (_B.ROWS,),
    OpKind.LOAD_EMBEDDING: (_B.ROWS, _B.GATHERED),
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
    OpKind.ATTEND_DEVICE: (_B.ROWS, _B.QUERY, _B.NEW_KV, _B.CACHE_GPU, _B.STREAMED_CACHE),
    OpKind.ATTEND_HOST: (_B.ROWS, _B.HOST_QUERY, _B.CACHE_CPU),
    OpKind.LOAD_ATTENTION: (_B.ROWS, _B.HOST_ATTENTION),
    OpKind.FINISH: (_B.ROWS, _B.DEVICE_WEIGHTS, _B.WORK, _B.ATTENTION, _B.HIDDEN_GPU),
    OpKind.STORE_HIDDEN: (_B.ROWS, _B.WORK),
    OpKind.WRITE_HIDDEN: (_B.ROWS, _B.HIDDEN_OUT),
    OpKind.SAMPLE: (_B.ROWS, _B.LOGITS),
    OpKind.ACCEPT: (_B.ROWS, _B.CHOSEN, _B.TOKENS),
}
WRITES: dict[OpKind, tuple[Buffer, ...]] = {
    OpKind.COMPOSE: (_B.ROWS, _B.TOKENS),
    OpKind.GATHER: (_B.GATHERED,),
    OpKind.LOAD_EMBEDDING: (_B.WORK,),
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
    OpKind.ATTEND_DEVICE: (_B.ATTENTION, _B.STREAMED_CACHE),
    OpKind.ATTEND_HOST: (_B.HOST_ATTENTION,),
    OpKind.LOAD_ATTENTION: (_B.ATTENTION,),
    OpKind.FINISH: (_B.WORK, _B.HIDDEN_GPU, _B.LOGITS),
    OpKind.STORE_HIDDEN: (_B.HIDDEN_CPU, _B.HIDDEN_OUT),
    OpKind.WRITE_HIDDEN: (_B.HIDDEN_DISK,),
    OpKind.SAMPLE: (_B.CHOSEN,),
    OpKind.ACCEPT: (_B.TOKENS,),
}

_PER_BATCH = frozenset({_B.HIDDEN_GPU, _B.HIDDEN_CPU, _B.HIDDEN_DISK, _B.TOKENS})
_PER_LAYER = frozenset({_B.CACHE_GPU, _B.CACHE_CPU, _B.CACHE_TAIL, _B.CACHE_DISK})

Slot = tuple[Buffer, int, int]


@dataclass(frozen=True, slots=True)
class Op:
    """One step of one cell.

    visit: pass of a block through the stage; layer: 0 embeds, the last is the head; batch: of the
    block; part: which of num_gpu_batches equal parts of a layer's weights, for the ops that move
    them; cell_slot, weights_slot, staging_slot: which copy of the memory that is used in turn this
    op uses; ends_visit: whether it is the last to tell what becomes of its visit's tokens.
    """

    kind: OpKind
    visit: int
    layer: int
    batch: int
    cell_slot: int
    weights_slot: int
    part: int = 0
    staging_slot: int = 0
    ends_visit: bool = False

    @property
    def lane(self) -> Lane:
        return LANE[self.kind]

    @property
    def key(self) -> tuple:
        """All that decides which slots it touches."""
        return (
            self.kind, self.layer, self.batch, self.cell_slot,
            self.weights_slot, self.staging_slot, self.visit % 2,
        )  # fmt: skip

    @property
    def reads(self) -> tuple[Slot, ...]:
        return tuple(_slot(buffer, *self.key[1:]) for buffer in READS[self.kind])

    @property
    def writes(self) -> tuple[Slot, ...]:
        return tuple(_slot(buffer, *self.key[1:]) for buffer in WRITES[self.kind])


@cache
def _slot(
    buffer: Buffer, layer: int, batch: int, cell: int, weights: int, staging: int, parity: int
) -> Slot:
    """The copy of `buffer` that an op of these numbers touches."""
    if buffer is Buffer.DEVICE_WEIGHTS:
        return buffer, weights, 0
    if buffer is Buffer.HOST_WEIGHTS:
        return buffer, staging, 0
    if buffer in _PER_BATCH:
        return buffer, batch, 0
    if buffer in _PER_LAYER:
        return buffer, layer, batch
    if buffer is Buffer.ROWS:
        return buffer, batch, parity
    return buffer, cell, 0
