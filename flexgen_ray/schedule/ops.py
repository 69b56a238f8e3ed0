"""The vocabulary of the schedule: ops, lanes, buffers, and `OPS`, the table of all op kinds.

Adding a kind of op takes one member of `OpKind`, one entry of `OPS`, one handler
(runtime/handlers.py) and one cost (cost/ops.py). zigzag.py generates ops in program order, which is
a correct serial execution; dependencies.py derives from `OPS` which other orders are correct.

Knows no tensors, bytes or seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from functools import cached_property

CELL_SLOTS = 2  # double buffering: one slot is filled while the other is used
LAYER_SLOTS = 2
HEAD_SLOT = 2  # the head's own, so that the next visit's first layer can arrive while this one ends
WEIGHTS_SLOTS = 3
EXPERT_STAGING_SLOTS = 2  # groups of experts from disk: one being read, one loaded


def staging_slots(num_batches: int) -> int:
    """Parts of disk weights that host memory holds: one being read, one loaded, one in between."""
    return min(3, num_batches + 1)


class OpKind(StrEnum):
    """Kinds of ops; docs/design.md shows the cell that they form."""

    __hash__ = str.__hash__  # Enum's __hash__ is Python code, and kinds are dictionary keys

    RECV_TOKENS = auto()  # the tokens that the last stage sampled, one turn of the block ago
    COMPOSE = auto()  # choose the rows of this pass of a batch
    RECV_ROWS = auto()  # the rows of this pass, from the stage before; forwarded immediately
    RECV = auto()  # hidden states from the stage before, into a host slot
    GATHER = auto()  # look up embedding rows on the host
    LOAD_EMBEDDING = auto()  # gathered or received hidden states, to the device
    EMBED = auto()  # loaded rows, or rows looked up on the device, become the hidden states
    READ_WEIGHTS = auto()  # a part of a coming layer's disk weights, into a host slot
    LOAD_WEIGHTS = auto()  # a part of the next layer's streamed weights, to the device
    READ_EXPERTS = auto()  # a group of experts on disk, into a host slot
    LOAD_EXPERTS = auto()  # a group of experts, to the device, if they don't come with their layer
    READ_HIDDEN = auto()  # hidden states on disk, into a host slot
    LOAD_HIDDEN = auto()  # hidden states off the device, to the device
    READ_CACHE = auto()  # pages of the cache on disk, into a host slot
    LOAD_CACHE = auto()  # rows of the cache that the device attends, to the device
    PROJECT = auto()  # norm, QKV, positions; append decoded tokens to the cache on the device
    STORE_CACHE = auto()  # new keys and values off the device, and queries for host attention
    APPEND_CACHE = auto()  # stored keys and values that fill no page, to their places in memory
    WRITE_CACHE = auto()  # full pages of the cache, to disk
    CHOOSE = auto()  # the tokens whose values streamed rows need, if attention is sparse
    GATHER_VALUES = auto()  # the values of the chosen tokens, side by side in host memory
    LOAD_VALUES = auto()  # the gathered values, to the device
    ATTEND_DEVICE = auto()  # attend rows on the device, or streamed to it; append prompts' tokens
    ATTEND_HOST = auto()  # attend rows in host memory, where their cache lies
    LOAD_ATTENTION = auto()  # results of ATTEND_HOST, to the device
    FINISH = auto()  # output projection and MLP; the head's logits
    OUT = auto()  # for FINISH in a mixture: output projection, norm, choice of experts
    EXPERTS = auto()  # experts, for the rows of several batches at once
    COMBINE = auto()  # what the experts gave, to a batch's hidden states
    STORE_HIDDEN = auto()  # hidden states that lie off the device, to host memory
    WRITE_HIDDEN = auto()  # hidden states that lie on disk, to disk
    STORE_SENT = auto()  # hidden states for the next stage, to host memory
    SEND = auto()  # the stored hidden states, to the next stage
    SAMPLE = auto()  # sample a batch's next tokens on the device
    ACCEPT = auto()  # the sampled tokens, to the host's scheduler or to the first stage


class Lane(StrEnum):
    """A first-in, first-out queue of ops. Lanes only order ops; what is scarce are resources.

    Ops that are issued ahead of need have lanes of their own (`*_AHEAD`): they may wait without
    holding up the ops that finish the current cell.
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
        """The lane by which a thread or stream that serves two lanes is named."""
        return _SERVED_BY.get(self, self)


_SERVED_BY = {
    Lane.DEVICE_AHEAD: Lane.DEVICE,
    Lane.LOAD_AHEAD: Lane.LOAD_SMALL,
    Lane.STORE_AHEAD: Lane.STORE,
    Lane.DISK_READ_AHEAD: Lane.DISK_READ,
}


# Lanes whose ops run on a stream of a GPU, if the device is one; one thread issues all of them.
ON_STREAMS = frozenset(
    {
        Lane.DEVICE,
        Lane.DEVICE_AHEAD,
        Lane.LOAD_WEIGHTS,
        Lane.LOAD_CACHE,
        Lane.LOAD_SMALL,
        Lane.LOAD_AHEAD,
        Lane.STORE,
        Lane.STORE_AHEAD,
    }
)


class Buffer(StrEnum):
    """A piece of memory that ops share; dependencies.py says which of its copies an op touches."""

    __hash__ = str.__hash__

    # One copy per weights slot, and one per staging slot.
    DEVICE_WEIGHTS = auto()  # streamed weights
    HOST_WEIGHTS = auto()  # a part of disk weights on its way
    # One copy per expert slot, and one per staging slot of experts.
    DEVICE_EXPERTS = auto()  # a streamed group of experts
    HOST_EXPERTS = auto()  # a group of experts from disk on its way
    # One copy.
    ROUTED = auto()  # rows on their way through experts
    # One copy per cell slot.
    WORK = auto()  # hidden states of a cell on the device, unless they stay in HIDDEN_GPU
    QUERY = auto()
    NEW_KV = auto()
    ATTENTION = auto()  # may lie where the queries lay
    STREAMED_CACHE = auto()
    CHOICE = auto()  # the tokens that sparse attention keeps, on the device and on the host
    ARRIVED = auto()  # embeddings looked up, or hidden states received
    HOST_NEW_KV = auto()
    HOST_QUERY = auto()
    HOST_ATTENTION = auto()
    HOST_VALUES = auto()  # values of the tokens that sparse attention keeps
    HIDDEN_IN = auto()
    HIDDEN_OUT = auto()
    CACHE_IN = auto()
    CACHE_OUT = auto()
    LOGITS = auto()
    CHOSEN = auto()  # sampled tokens
    # One copy per hidden slot: hidden states between layers.
    HIDDEN_GPU = auto()
    HIDDEN_CPU = auto()
    HIDDEN_DISK = auto()
    SENT = auto()
    # One copy per batch, and one per batch and turn.
    TOKENS = auto()
    ROWS = auto()  # the rows of a pass
    # One copy per batch: pages of the cache that its rows have, on all tiers and in all layers.
    PAGES = auto()
    # One copy per layer and batch: the KV cache.
    CACHE_GPU = auto()
    CACHE_CPU = auto()
    CACHE_TAIL = auto()
    CACHE_DISK = auto()


class Condition(Enum):
    """A condition on a stage's plan for an op to have work; layout/active_ops.py evaluates it."""

    ALWAYS = auto()
    IN_RING = auto()  # the stage is one of several
    STREAMS_WEIGHTS = auto()  # some of the layer's weights lie off the device
    STAGES_DISK_WEIGHTS = auto()  # some lie on disk, and pass through host memory
    STAGES_DISK_EXPERTS = auto()  # a group of experts lies on disk, and passes through host memory
    INPUT_FROM_HOST = auto()  # embeddings are looked up on the host, or come from another stage
    HIDDEN_OFF_DEVICE = auto()
    HIDDEN_ON_DISK = auto()
    CACHE_OFF_DEVICE = auto()
    CACHE_ON_DISK = auto()
    STREAMS_CACHE = auto()
    STREAMS_CHOSEN_VALUES = auto()  # attention is sparse, and the device attends streamed rows
    ATTENDS_ON_HOST = auto()


class Path(Enum):
    """The paths of a batch through a layer that an op lies on; cost/bound.py adds up each path.

    The device and the host attend a batch's rows in parallel, so a layer has two paths.
    """

    BOTH = auto()
    DEVICE = auto()
    HOST = auto()
    NEITHER = auto()  # prefetched, or written behind: no op of the batch waits for it


@dataclass(frozen=True)
class OpSpec:
    """All that the schedule knows of a kind of op.

    reads, writes: the buffers that the op touches. is_exchange: True if the op may wait for another
    stage, however little it has to do.
    """

    lane: Lane
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    condition: Condition = Condition.ALWAYS
    path: Path = Path.BOTH
    is_exchange: bool = False

    @cached_property
    def needs_rows(self) -> bool:
        """True if the op has nothing to do in a pass without rows."""
        return Buffer.ROWS in self.reads

    @cached_property
    def moves_weights(self) -> bool:
        """True if the op belongs to a layer's weights, not to a batch."""
        return not _OF_WEIGHTS.isdisjoint(self.writes)


_OF_WEIGHTS = frozenset(
    {
        Buffer.HOST_WEIGHTS,
        Buffer.DEVICE_WEIGHTS,
        Buffer.HOST_EXPERTS,
        Buffer.DEVICE_EXPERTS,
    }
)
_K, _L, _B, _C = OpKind, Lane, Buffer, Condition
OPS: dict[OpKind, OpSpec] = {
    _K.RECV_TOKENS: OpSpec(_L.RECV, (_B.TOKENS,), (_B.TOKENS,), _C.IN_RING, is_exchange=True),
    _K.COMPOSE: OpSpec(_L.RECV, (_B.TOKENS,), (_B.ROWS, _B.TOKENS, _B.PAGES)),
    _K.RECV_ROWS: OpSpec(_L.RECV, (), (_B.ROWS, _B.PAGES), is_exchange=True),
    _K.RECV: OpSpec(_L.RECV, (_B.ROWS,), (_B.ARRIVED,), is_exchange=True),
    _K.GATHER: OpSpec(_L.RECV, (_B.ROWS,), (_B.ARRIVED,), _C.INPUT_FROM_HOST),
    _K.LOAD_EMBEDDING: OpSpec(
        _L.LOAD_AHEAD, (_B.ROWS, _B.ARRIVED), (_B.WORK, _B.HIDDEN_GPU), _C.INPUT_FROM_HOST
    ),
    _K.EMBED: OpSpec(_L.DEVICE_AHEAD, (_B.ROWS, _B.WORK), (_B.WORK, _B.HIDDEN_GPU)),
    _K.READ_WEIGHTS: OpSpec(
        _L.DISK_READ_AHEAD, (), (_B.HOST_WEIGHTS,), _C.STAGES_DISK_WEIGHTS, Path.NEITHER
    ),
    _K.LOAD_WEIGHTS: OpSpec(
        _L.LOAD_WEIGHTS, (_B.HOST_WEIGHTS,), (_B.DEVICE_WEIGHTS,), _C.STREAMS_WEIGHTS, Path.NEITHER
    ),
    _K.READ_EXPERTS: OpSpec(
        _L.DISK_READ_AHEAD, (), (_B.HOST_EXPERTS,), _C.STAGES_DISK_EXPERTS, Path.NEITHER
    ),
    _K.LOAD_EXPERTS: OpSpec(
        _L.LOAD_WEIGHTS, (_B.HOST_EXPERTS,), (_B.DEVICE_EXPERTS,), path=Path.NEITHER
    ),
    _K.READ_HIDDEN: OpSpec(
        _L.DISK_READ, (_B.ROWS, _B.HIDDEN_DISK), (_B.HIDDEN_IN,), _C.HIDDEN_ON_DISK
    ),
    _K.LOAD_HIDDEN: OpSpec(
        _L.LOAD_AHEAD, (_B.ROWS, _B.HIDDEN_CPU, _B.HIDDEN_IN), (_B.WORK,), _C.HIDDEN_OFF_DEVICE
    ),
    _K.READ_CACHE: OpSpec(
        _L.DISK_READ, (_B.ROWS, _B.CACHE_DISK), (_B.CACHE_IN,), _C.CACHE_ON_DISK, Path.NEITHER
    ),
    _K.LOAD_CACHE: OpSpec(
        _L.LOAD_CACHE,
        (_B.ROWS, _B.CACHE_CPU, _B.CACHE_TAIL, _B.CACHE_IN),
        (_B.STREAMED_CACHE,),
        _C.STREAMS_CACHE,
        Path.NEITHER,
    ),
    _K.PROJECT: OpSpec(
        _L.DEVICE_AHEAD,
        (_B.ROWS, _B.DEVICE_WEIGHTS, _B.HIDDEN_GPU, _B.WORK),
        (_B.WORK, _B.QUERY, _B.ATTENTION, _B.NEW_KV, _B.CACHE_GPU),
    ),
    _K.STORE_CACHE: OpSpec(
        _L.STORE_AHEAD,
        (_B.ROWS, _B.PAGES, _B.NEW_KV, _B.QUERY),
        (_B.HOST_NEW_KV, _B.HOST_QUERY, _B.CACHE_CPU, _B.CACHE_OUT),
        _C.CACHE_OFF_DEVICE,
        Path.HOST,
    ),
    _K.APPEND_CACHE: OpSpec(
        _L.HOST,
        (_B.ROWS, _B.PAGES, _B.HOST_NEW_KV),
        (_B.CACHE_CPU, _B.CACHE_TAIL, _B.CACHE_OUT),
        _C.CACHE_OFF_DEVICE,
        Path.HOST,
    ),
    _K.WRITE_CACHE: OpSpec(
        _L.DISK_WRITE,
        (_B.ROWS, _B.PAGES, _B.CACHE_OUT),
        (_B.CACHE_DISK,),
        _C.CACHE_ON_DISK,
        Path.NEITHER,
    ),
    _K.CHOOSE: OpSpec(
        _L.DEVICE_AHEAD,
        (_B.ROWS, _B.QUERY, _B.NEW_KV, _B.STREAMED_CACHE),
        (_B.STREAMED_CACHE, _B.CHOICE),
        _C.STREAMS_CHOSEN_VALUES,
        Path.DEVICE,
    ),
    _K.GATHER_VALUES: OpSpec(
        _L.GATHER_VALUES,
        (_B.ROWS, _B.CHOICE, _B.CACHE_CPU, _B.CACHE_TAIL, _B.CACHE_IN),
        (_B.HOST_VALUES,),
        _C.STREAMS_CHOSEN_VALUES,
        Path.DEVICE,
    ),
    _K.LOAD_VALUES: OpSpec(
        _L.LOAD_SMALL,
        (_B.ROWS, _B.HOST_VALUES),
        (_B.STREAMED_CACHE,),
        _C.STREAMS_CHOSEN_VALUES,
        Path.DEVICE,
    ),
    _K.ATTEND_DEVICE: OpSpec(
        _L.DEVICE_AHEAD,
        (_B.ROWS, _B.QUERY, _B.NEW_KV, _B.CACHE_GPU, _B.STREAMED_CACHE, _B.CHOICE),
        (_B.ATTENTION, _B.STREAMED_CACHE, _B.CACHE_GPU),
        path=Path.DEVICE,
    ),
    _K.ATTEND_HOST: OpSpec(
        _L.HOST,
        (_B.ROWS, _B.HOST_QUERY, _B.CACHE_CPU),
        (_B.HOST_ATTENTION,),
        _C.ATTENDS_ON_HOST,
        Path.HOST,
    ),
    _K.LOAD_ATTENTION: OpSpec(
        _L.LOAD_SMALL,
        (_B.ROWS, _B.HOST_ATTENTION),
        (_B.ATTENTION,),
        _C.ATTENDS_ON_HOST,
        Path.HOST,
    ),
    _K.FINISH: OpSpec(
        _L.DEVICE,
        (_B.ROWS, _B.DEVICE_WEIGHTS, _B.WORK, _B.ATTENTION, _B.HIDDEN_GPU),
        (_B.WORK, _B.HIDDEN_GPU, _B.LOGITS),
    ),
    _K.OUT: OpSpec(
        _L.DEVICE,
        (_B.ROWS, _B.DEVICE_WEIGHTS, _B.WORK, _B.ATTENTION, _B.HIDDEN_GPU),
        (_B.WORK, _B.HIDDEN_GPU, _B.ROUTED),
    ),
    _K.EXPERTS: OpSpec(
        _L.DEVICE, (_B.ROWS, _B.DEVICE_WEIGHTS, _B.DEVICE_EXPERTS, _B.ROUTED), (_B.ROUTED,)
    ),
    _K.COMBINE: OpSpec(
        _L.DEVICE, (_B.ROWS, _B.WORK, _B.HIDDEN_GPU, _B.ROUTED), (_B.WORK, _B.HIDDEN_GPU)
    ),
    _K.STORE_HIDDEN: OpSpec(
        _L.STORE, (_B.ROWS, _B.WORK), (_B.HIDDEN_CPU, _B.HIDDEN_OUT), _C.HIDDEN_OFF_DEVICE
    ),
    _K.WRITE_HIDDEN: OpSpec(
        _L.DISK_WRITE, (_B.ROWS, _B.HIDDEN_OUT), (_B.HIDDEN_DISK,), _C.HIDDEN_ON_DISK
    ),
    _K.STORE_SENT: OpSpec(_L.STORE, (_B.ROWS, _B.WORK, _B.HIDDEN_GPU), (_B.SENT,)),
    _K.SEND: OpSpec(_L.SEND, (_B.ROWS, _B.SENT), (), is_exchange=True),
    _K.SAMPLE: OpSpec(_L.DEVICE, (_B.ROWS, _B.LOGITS), (_B.CHOSEN,)),
    _K.ACCEPT: OpSpec(_L.SEND, (_B.ROWS, _B.CHOSEN, _B.TOKENS), (_B.TOKENS,)),
}


@dataclass(frozen=True, slots=True)
class Op:
    """One step of one cell: of one batch in one layer; or of several batches (EXPERTS).

    visit: number of the trip that a block's batches make through the stage; layer: 0 embeds, the
    last is the head; batch: number among the batches of all blocks; part: which of num_gpu_batches
    equal parts of a layer's weights, for ops that move weights; *_slot: which copy of double-
    buffered memory the op uses; turn: which copy of what a block's next visit must not overwrite;
    ends_visit: True for the last op of a visit; batches: for how many batches the op works, of
    which `batch` is the last; group: which group of a layer's experts, and expert_slot the copy of
    memory that it streams to.
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
    batches: int = 1
    group: int = 0
    expert_slot: int = 0

    @property
    def lane(self) -> Lane:
        return OPS[self.kind].lane

    @property
    def key(self) -> tuple:
        """The fields that decide which copies of buffers the op touches."""
        return (
            self.kind, self.layer, self.batch, self.cell_slot, self.weights_slot,
            self.hidden_slot, self.turn, self.staging_slot, self.expert_slot,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """The time in which an op ran, measured, emulated or simulated; seconds since the run began."""

    op: Op
    start: float
    end: float
