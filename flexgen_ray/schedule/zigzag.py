"""The zig-zag block schedule (FlexGen, section 3) as a lazy stream of ops.

A visit walks a block's batches through the layers column by column, so each layer's weights cross
the link once a visit. Two things run ahead of need: weights, by one layer from host memory and by
two from disk, one part per batch so that the link's work is spread evenly; and the next cell's
loads, projection and attention, issued before this cell is finished, so that the device works on
one batch while the host attends another.

Knows layers, batches and their order; no rows, bytes or placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from flexgen_ray.schedule.ops import NUM_SLOTS, Op, OpKind

_LOADS = (OpKind.READ_HIDDEN, OpKind.LOAD_HIDDEN)
_ATTENTION = (
    OpKind.READ_CACHE,
    OpKind.LOAD_CACHE,
    OpKind.PROJECT,
    OpKind.STORE_CACHE,
    OpKind.WRITE_CACHE,
    OpKind.ATTEND_DEVICE,
    OpKind.ATTEND_HOST,
    OpKind.LOAD_ATTENTION,
)
_HIDDEN_HOME = (OpKind.STORE_HIDDEN, OpKind.WRITE_HIDDEN)
BEGIN = {
    "embedding": (OpKind.COMPOSE, OpKind.GATHER, OpKind.LOAD_EMBEDDING),
    "decoder": _LOADS + _ATTENTION,
    "head": _LOADS,
}
FINISH = {
    "embedding": (OpKind.FINISH, *_HIDDEN_HOME),
    "decoder": (OpKind.FINISH, *_HIDDEN_HOME),
    "head": (OpKind.FINISH, OpKind.SAMPLE),
}


@dataclass(frozen=True)
class StageLayers:
    """The contiguous layers of one stage out of a model of `num_layers` decoder layers.

    Layer 0 embeds, 1 to num_layers decode, num_layers + 1 is the head.
    """

    first: int
    last: int
    num_layers: int

    @staticmethod
    def whole(num_layers: int) -> StageLayers:
        return StageLayers(0, num_layers + 1, num_layers)

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def with_weights(self) -> range:
        """The layers whose weights may stream; embeddings are gathered instead."""
        return range(max(self.first, 1), self.last + 1)

    def kind(self, layer: int) -> str:
        if layer == 0:
            return "embedding"
        return "head" if layer == self.num_layers + 1 else "decoder"


@dataclass(frozen=True, slots=True)
class _Cell:
    visit: int
    layer: int
    batch: int
    slot: int


def zigzag(stage: StageLayers, num_batches: int, visits: Iterable[int]) -> Iterator[Op]:
    """Ops of a stage in program order.

    `visits` yields 0, 1, 2, …; it is asked for the next only when every SAMPLE of the one before
    has been issued, so it may wait for their tokens. At the end of a job the weights that a next
    visit would have needed have been fetched in vain.
    """
    weights = _WeightStream(stage, num_batches)
    for visit in visits:
        if visit == 0:
            yield from weights.prologue()
        places = [(layer, batch) for layer in stage.layers for batch in range(num_batches)]
        first = visit * len(places)
        cells = [
            _Cell(visit, layer, batch, (first + number) % NUM_SLOTS)
            for number, (layer, batch) in enumerate(places)
        ]
        yield from _ops(cells[0], BEGIN, stage, weights)
        for cell, following in pairwise(cells):
            yield from weights.prefetch(cell)
            # With one batch the next cell needs what this one finishes.
            if num_batches > 1:
                yield from _ops(following, BEGIN, stage, weights)
            yield from _ops(cell, FINISH, stage, weights)
            if num_batches == 1:
                yield from _ops(following, BEGIN, stage, weights)
        yield from weights.prefetch(cells[-1])
        *others, last = _ops(cells[-1], FINISH, stage, weights)
        yield from others
        yield replace(last, ends_visit=True)


def _ops(cell: _Cell, half: dict, stage: StageLayers, weights: _WeightStream) -> Iterator[Op]:
    weights_slot = weights.slot(cell.visit, cell.layer)
    for kind in half[stage.kind(cell.layer)]:
        yield Op(kind, cell.visit, cell.layer, cell.batch, cell.slot, weights_slot)


class _WeightStream:
    """The endless walk over the stage's weights: visit after visit, layer after layer."""

    def __init__(self, stage: StageLayers, num_batches: int) -> None:
        self.layers = stage.with_weights
        self.num_batches = num_batches

    def slot(self, visit: int, layer: int) -> int:
        return self._ordinal(visit, layer) % NUM_SLOTS

    def prologue(self) -> Iterator[Op]:
        """What the first layer needs before any cell can hide it."""
        for part in range(self.num_batches):
            yield self._op(OpKind.READ_WEIGHTS, 0, part)
        for part in range(self.num_batches):
            yield self._op(OpKind.LOAD_WEIGHTS, 0, part)
        for part in range(self.num_batches):
            yield self._op(OpKind.READ_WEIGHTS, 1, part)

    def prefetch(self, cell: _Cell) -> Iterator[Op]:
        """One part of the next layer's weights, and from disk of the one after."""
        if cell.layer not in self.layers:
            return
        ordinal = self._ordinal(cell.visit, cell.layer)
        yield self._op(OpKind.LOAD_WEIGHTS, ordinal + 1, cell.batch)
        yield self._op(OpKind.READ_WEIGHTS, ordinal + 2, cell.batch)

    def _ordinal(self, visit: int, layer: int) -> int:
        return visit * len(self.layers) + layer - self.layers.start

    def _op(self, kind: OpKind, ordinal: int, part: int) -> Op:
        visit, index = divmod(ordinal, len(self.layers))
        layer = self.layers[index]
        return Op(kind, visit, layer, part, 0, ordinal % NUM_SLOTS, part)
