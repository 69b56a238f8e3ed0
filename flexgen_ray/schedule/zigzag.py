"""The zig-zag block schedule (FlexGen, section 3) as a lazy stream of ops.

A visit walks a block's batches through the layers column by column, so each layer's weights cross
the link once a visit. Two things run ahead of need, from visit to visit too: weights, by one layer,
and from disk by a few parts more, one part per batch so that the link's work is spread evenly; and
the next cell's loads, projection and attention, issued before this cell is finished, so that the
device works on one batch while the host attends another.

A cell is a decoder layer's. A batch's first brings it into the stage, and its last takes it out, so
that the next visit begins while this one's last batch is attended.

Knows layers, batches and their order; no rows, bytes or placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from flexgen_ray.schedule.ops import CELL_SLOTS, HEAD_SLOT, LAYER_SLOTS, Op, OpKind, staging_slots

_LOADS = (OpKind.READ_HIDDEN, OpKind.LOAD_HIDDEN)
_ATTENTION = (
    OpKind.READ_CACHE,
    OpKind.LOAD_CACHE,
    OpKind.PROJECT,
    OpKind.STORE_CACHE,
    OpKind.APPEND_CACHE,
    OpKind.WRITE_CACHE,
    OpKind.CHOOSE,
    OpKind.GATHER_VALUES,
    OpKind.LOAD_VALUES,
    OpKind.ATTEND_DEVICE,
    OpKind.ATTEND_HOST,
    OpKind.LOAD_ATTENTION,
)
_HIDDEN_HOME = (OpKind.STORE_HIDDEN, OpKind.WRITE_HIDDEN)
_BEGIN = _LOADS + _ATTENTION
_FINISH = (OpKind.FINISH, *_HIDDEN_HOME)
_ENTER = {
    "embedding": (
        OpKind.RECV_TOKENS,
        OpKind.COMPOSE,
        OpKind.GATHER,
        OpKind.LOAD_EMBEDDING,
        OpKind.EMBED,
        *_HIDDEN_HOME,
    ),
    "entry": (
        OpKind.RECV_ROWS,
        OpKind.RECV,
        OpKind.LOAD_EMBEDDING,
        OpKind.EMBED,
        *_HIDDEN_HOME,
    ),
}
_LEAVE = {
    "head": (*_LOADS, OpKind.FINISH, OpKind.SAMPLE, OpKind.ACCEPT),
    "exit": (*_LOADS, OpKind.FINISH, OpKind.STORE_SENT, OpKind.SEND),
}


@dataclass(frozen=True)
class StageLayers:
    """The contiguous layers of one stage out of a model of `num_layers` decoder layers.

    Layer 0 embeds, 1 to num_layers decode, num_layers + 1 is the head. To the schedule the layer
    before a later stage's first is its entry, and the one after an earlier stage's last its exit.
    """

    first: int
    last: int
    num_layers: int

    @staticmethod
    def whole(num_layers: int) -> StageLayers:
        return StageLayers(0, num_layers + 1, num_layers)

    @staticmethod
    def split(num_layers: int, counts: Sequence[int]) -> list[StageLayers]:
        """Stages of so many decoder layers each; the first embeds, the last has the head.

        Raises ValueError if a stage would have no decoder layer, or they don't sum to num_layers.
        """
        if sum(counts) != num_layers or min(counts) < 1:
            raise ValueError(
                f"stages of {', '.join(map(str, counts))} layers: each needs one at least, and "
                f"together they must be the model's {num_layers}"
            )
        ends = list(accumulate(counts))
        firsts = [0, *(end + 1 for end in ends[:-1])]
        return [
            StageLayers(first, last, num_layers)
            for first, last in zip(firsts, [*ends[:-1], num_layers + 1], strict=True)
        ]

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.last == self.num_layers + 1

    @property
    def is_whole(self) -> bool:
        return self.is_first and self.is_last

    @property
    def decoders(self) -> range:
        return range(max(self.first, 1), min(self.last, self.num_layers) + 1)

    @property
    def with_weights(self) -> range:
        """The layers whose weights may stream; embeddings are gathered instead."""
        return range(max(self.first, 1), self.last + 1)

    def weights_slot(self, visit: int, layer: int) -> int:
        """Where a layer's streamed weights lie on the device; the embedding has none."""
        if self.kind(layer) != "decoder":
            return HEAD_SLOT
        return (visit * len(self.decoders) + layer - self.decoders.start) % LAYER_SLOTS

    def kind(self, layer: int) -> str:
        if layer not in self.layers:
            return "entry" if layer < self.first else "exit"
        if layer == 0:
            return "embedding"
        return "head" if layer == self.num_layers + 1 else "decoder"


def zigzag(
    stage: StageLayers, num_batches: int, visits: Iterable[int], num_blocks: int = 1
) -> Iterator[Op]:
    """Ops of a stage in program order, for visits 0, 1, 2, …: endless, if they are.

    Blocks take turns: visit v is one of block v % num_blocks, each of num_batches batches.
    Whether a visit has any rows is known only when its COMPOSE ops run: the one after a job's last
    has none. When a stream ends, weights have been fetched in vain for what would have come next.
    """
    weights = _WeightStream(stage, num_batches)
    yield from weights.prologue()
    cell: Op | None = None
    for following in _cells(stage, num_batches, visits, num_blocks):
        if cell is None:
            yield from _begin(following, stage)
        else:
            yield from weights.prefetch(cell)
            # With one batch the next cell needs what this one finishes.
            if num_batches > 1:
                yield from _begin(following, stage)
            yield from _finish(cell, stage)
            if num_batches == 1:
                yield from _begin(following, stage)
        cell = following
    if cell is not None:
        yield from weights.prefetch(cell)
        yield from _finish(cell, stage)


def _cells(
    stage: StageLayers, num_batches: int, visits: Iterable[int], num_blocks: int
) -> Iterator[Op]:
    """One op a cell, as the pattern of all its ops."""
    number = 0
    for visit in visits:
        turn, block = divmod(visit, num_blocks)
        # Of the blocks that come after it, one at most is met on the way.
        hidden_block = visit % min(num_blocks, 2)
        for layer in stage.decoders:
            weights_slot = stage.weights_slot(visit, layer)
            for index in range(num_batches):
                yield Op(
                    OpKind.FINISH, visit, layer, block * num_batches + index,
                    cell_slot=number % CELL_SLOTS,
                    weights_slot=weights_slot,
                    hidden_slot=hidden_block * num_batches + index,
                    turn=turn % 2,
                    part=index,
                    ends_visit=layer == stage.decoders[-1] and index == num_batches - 1,
                )  # fmt: skip
                number += 1


def _begin(cell: Op, stage: StageLayers) -> Iterator[Op]:
    if cell.layer == stage.decoders[0]:
        yield from _ops(cell, _ENTER[stage.kind(cell.layer - 1)], cell.layer - 1)
    yield from _ops(cell, _BEGIN, cell.layer)


def _finish(cell: Op, stage: StageLayers) -> Iterator[Op]:
    yield from _ops(cell, _FINISH, cell.layer)
    if cell.layer == stage.decoders[-1]:
        yield from _ops(cell, _LEAVE[stage.kind(cell.layer + 1)], cell.layer + 1)


def _ops(cell: Op, kinds: Sequence[OpKind], layer: int) -> Iterator[Op]:
    """Those of a cell's batch in a layer: the cell's own, or beside it. The last of the last cell's
    ends the visit."""
    weights_slot = cell.weights_slot if layer == cell.layer else HEAD_SLOT
    for kind in kinds:
        yield Op(
            kind, cell.visit, layer, cell.batch, cell.cell_slot, weights_slot,
            cell.hidden_slot, cell.turn, cell.part,
            ends_visit=cell.ends_visit and layer > cell.layer and kind is kinds[-1],
        )  # fmt: skip


class _WeightStream:
    """The endless walk over the parts of the stage's weights: visit after visit, layer after layer.

    A part is loaded one layer ahead of its use, and read from disk as many parts ahead of that as
    host memory has slots for. The head's come with its last decoder layer's first cell.
    """

    def __init__(self, stage: StageLayers, num_batches: int) -> None:
        self.stage = stage
        self.layers = stage.with_weights
        self.num_batches = num_batches
        self.staging_slots = staging_slots(num_batches)

    def prologue(self) -> Iterator[Op]:
        """What the first layer needs before any cell can hide it."""
        for number in range(self.staging_slots):
            yield self._op(OpKind.READ_WEIGHTS, number)
        for number in range(self.num_batches):
            yield from self._move(number)

    def prefetch(self, cell: Op) -> Iterator[Op]:
        """One part of the next layer's weights, and before those the whole head's."""
        ordinal = cell.visit * len(self.layers) + cell.layer - self.layers.start + 1
        if self.layers[-1] == cell.layer + 1 and self.stage.kind(cell.layer + 1) == "head":
            if not cell.part:
                for part in range(self.num_batches):
                    yield from self._move(ordinal * self.num_batches + part)
            ordinal += 1
        yield from self._move(ordinal * self.num_batches + cell.part)

    def _move(self, number: int) -> Iterator[Op]:
        """Loads a part, and reads another into the staging slot that this frees."""
        yield self._op(OpKind.LOAD_WEIGHTS, number)
        yield self._op(OpKind.READ_WEIGHTS, number + self.staging_slots)

    def _op(self, kind: OpKind, number: int) -> Op:
        ordinal, part = divmod(number, self.num_batches)
        visit, index = divmod(ordinal, len(self.layers))
        layer = self.layers[index]
        return Op(
            kind, visit, layer, batch=part,
            cell_slot=0,
            weights_slot=self.stage.weights_slot(visit, layer),
            part=part,
            staging_slot=number % self.staging_slots,
        )  # fmt: skip
