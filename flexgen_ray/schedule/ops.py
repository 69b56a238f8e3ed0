"""The vocabulary of the schedule: op kinds, and the lane each is issued on.

Program order is a correct serial execution. Any other must respect the hazards that the tables in
buffers.py imply (schedule/dependencies.py). Knows no tensor, no byte and no second.

An op with the time it ran: what is measured, emulated and simulated alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto


@dataclass(frozen=True, slots=True)
class Span:
    """One op as it ran; seconds since the run began."""

    op: Op
    start: float
    end: float


CELL_SLOTS = 2  # double buffering: one slot is filled while the other is used
LAYER_SLOTS = 2
HEAD_SLOT = 2  # its own, so that the next visit's first layer can arrive while this one ends
WEIGHTS_SLOTS = 3


def staging_slots(num_batches: int) -> int:
    """Parts of disk weights that host memory has room for: one read, one loaded, one between."""
    return min(3, num_batches + 1)


class OpKind(StrEnum):
    """What one op does; see docs/design.md for the cell they form."""

    __hash__ = str.__hash__  # Enum's own is Python, and these are looked up all the time

    RECV_TOKENS = auto()  # what the last stage chose, a turn of the block ago
    COMPOSE = auto()  # which rows this pass of a batch has
    RECV_ROWS = auto()  # the same, from the stage before; passed on at once
    RECV = auto()  # hidden states from the stage before, into a host slot
    GATHER = auto()  # embedding rows looked up on the host
    LOAD_EMBEDDING = auto()  # the gathered rows, or those received, to the device
    EMBED = auto()  # those, or rows looked up on the device, become the hidden states
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
    CHOOSE = auto()  # which tokens' values streamed rows need, if attention is sparse
    GATHER_VALUES = auto()  # those values, side by side in host memory
    LOAD_VALUES = auto()  # the same, to the device
    ATTEND_DEVICE = auto()  # rows on, or streamed to, the device
    ATTEND_HOST = auto()  # rows attended where their cache lies
    LOAD_ATTENTION = auto()  # results of ATTEND_HOST, to the device
    FINISH = auto()  # output projection and MLP; the logits
    STORE_HIDDEN = auto()  # hidden states that live off the device
    WRITE_HIDDEN = auto()  # hidden states that live on disk
    STORE_SENT = auto()  # hidden states for the next stage, to host memory
    SEND = auto()  # those, to the next stage
    SAMPLE = auto()  # next tokens of a batch, chosen on the device
    ACCEPT = auto()  # the same tokens, taken note of on the host, or sent to the first stage


class Lane(StrEnum):
    """A first-in-first-out queue; lanes only order, resources are scarce.

    What is begun ahead has lanes of its own: it may wait without holding up what is to be finished.
    """

    __hash__ = str.__hash__

    DEVICE = auto()
    DEVICE_AHEAD = auto()
    HOST = auto()
    GATHER_VALUES = auto()
    LOAD_WEIGHTS = auto()
    LOAD_CACHE = auto()
    LOAD_SMALL = auto()
    LOAD_AHEAD = auto()
    STORE = auto()
    STORE_AHEAD = auto()
    DISK_READ = auto()
    DISK_READ_AHEAD = auto()
    DISK_WRITE = auto()
    RECV = auto()
    SEND = auto()

    @property
    def worker(self) -> Lane:
        """The lane that stands for both where one thread or stream serves two."""
        return _SERVED_BY.get(self, self)


_SERVED_BY = {
    Lane.DEVICE_AHEAD: Lane.DEVICE,
    Lane.LOAD_AHEAD: Lane.LOAD_SMALL,
    Lane.STORE_AHEAD: Lane.STORE,
    Lane.DISK_READ_AHEAD: Lane.DISK_READ,
}
# Those that may wait for a neighbour, however little there is to do.
EXCHANGE = frozenset({OpKind.RECV_TOKENS, OpKind.RECV_ROWS, OpKind.RECV, OpKind.SEND})

LANE: dict[OpKind, Lane] = {
    OpKind.RECV_TOKENS: Lane.RECV,
    OpKind.COMPOSE: Lane.RECV,
    OpKind.RECV_ROWS: Lane.RECV,
    OpKind.RECV: Lane.RECV,
    OpKind.GATHER: Lane.RECV,
    OpKind.LOAD_EMBEDDING: Lane.LOAD_AHEAD,
    OpKind.EMBED: Lane.DEVICE_AHEAD,
    OpKind.READ_WEIGHTS: Lane.DISK_READ_AHEAD,
    OpKind.LOAD_WEIGHTS: Lane.LOAD_WEIGHTS,
    OpKind.READ_HIDDEN: Lane.DISK_READ,
    OpKind.LOAD_HIDDEN: Lane.LOAD_AHEAD,
    OpKind.READ_CACHE: Lane.DISK_READ,
    OpKind.LOAD_CACHE: Lane.LOAD_CACHE,
    OpKind.PROJECT: Lane.DEVICE_AHEAD,
    OpKind.STORE_CACHE: Lane.STORE_AHEAD,
    OpKind.APPEND_CACHE: Lane.HOST,
    OpKind.WRITE_CACHE: Lane.DISK_WRITE,
    OpKind.CHOOSE: Lane.DEVICE_AHEAD,
    OpKind.GATHER_VALUES: Lane.GATHER_VALUES,
    OpKind.LOAD_VALUES: Lane.LOAD_SMALL,
    OpKind.ATTEND_DEVICE: Lane.DEVICE_AHEAD,
    OpKind.ATTEND_HOST: Lane.HOST,
    OpKind.LOAD_ATTENTION: Lane.LOAD_SMALL,
    OpKind.FINISH: Lane.DEVICE,
    OpKind.STORE_HIDDEN: Lane.STORE,
    OpKind.WRITE_HIDDEN: Lane.DISK_WRITE,
    OpKind.STORE_SENT: Lane.STORE,
    OpKind.SEND: Lane.SEND,
    OpKind.SAMPLE: Lane.DEVICE,
    OpKind.ACCEPT: Lane.SEND,
}


@dataclass(frozen=True, slots=True)
class Op:
    """One step of one cell.

    visit: pass of a block through the stage; layer: 0 embeds, the last is the head; batch: of all
    blocks; part: which of num_gpu_batches equal parts of a layer's weights, for the ops that move
    them; *_slot: which copy of the memory that is used in turn this op uses; turn: likewise of what
    a block's next visit must not overwrite; ends_visit: whether it is its visit's last.
    """

    kind: OpKind
    visit: int
    layer: int
    batch: int
    cell_slot: int
    weights_slot: int
    hidden_slot: int = 0
    turn: int = 0
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
            self.kind, self.layer, self.batch, self.cell_slot, self.weights_slot,
            self.hidden_slot, self.turn, self.staging_slot,
        )  # fmt: skip
