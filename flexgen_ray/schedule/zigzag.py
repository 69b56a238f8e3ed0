"""The zig-zag block schedule (FlexGen, section 3) as a lazy stream of ops.

A *block* is the batches of sequences that share one trip of the weights; a *visit* is one such trip
through a stage, for all batches of one block; a *cell* is one decoder layer of one batch. A visit
walks the cells layer by layer, and batch by batch within a layer, so each layer's weights cross the
link once a visit.

Two things run ahead of need, across visits too. Weights are loaded one layer ahead, and read from
disk a few parts earlier still, one part per batch, so that the link's work is spread evenly. And
the next cell begins (its loads, projection and attention are issued) before the present one is
finished, so that the device works on one batch while the host attends another. With two decoder
layers (L1, L2), two batches (b0, b1), and the next visit's ops marked ':

    step   prefetch            begin          finish
    0      L1 parts 0 and 1    embed, L1 b0
    1      L2 part 0           embed, L1 b1   L1 b0
    2      L2 part 1           L2 b0          L1 b1
    3      head, L1' part 0    L2 b1          L2 b0, head b0: its tokens are sampled
    4      L1' part 1          embed', L1' b0 L2 b1, head b1: the visit ends
    5      L2' part 0          embed', L1' b1 L1' b0

In a mixture of experts a cell is finished in three ops: OUT of each batch, then EXPERTS once for
all batches of a part, which reads each expert once for all their rows, then COMBINE of each batch.
With parts of two batches, the cells of a layer L are finished so:

    finish L b0: OUT b0        finish L b1: OUT b1, EXPERTS b0 and b1, COMBINE b0, COMBINE b1

If a layer's experts are more than the device has room for, they stream apart from its other
weights, in groups, and EXPERTS runs once a group, for the whole block.

A batch's first cell brings it into the stage (embedding, or receiving from the stage before), and
its last cell takes it out (head, or sending to the next stage). So visit 1 begins in step 4, while
the last batch of visit 0 is still attended.

Knows layers, batches and their order; no rows, bytes or placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from flexgen_ray.schedule.ops import (
    CELL_SLOTS,
    EXPERT_STAGING_SLOTS,
    HEAD_SLOT,
    LAYER_SLOTS,
    Op,
    OpKind,
    staging_slots,
)

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
class Mixtures:
    """Decoder layers that are mixtures of experts, in which the batches of a block form parts.

    A part's experts run once, for the rows of all its batches. batches: of a part; the last part of
    a block may have fewer. groups: {layer: groups of experts that stay on the device, groups that
    stream to it}, where a layer's experts run group by group, each for the whole block; empty if
    all of a layer's experts are on the device at a time. slots: groups for which it has memory.
    """

    layers: frozenset[int] = frozenset()
    batches: int = 1
    groups: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    slots: int = 0

    def first_of_part(self, cell: Op) -> int:
        """Number within its block of the first batch of a cell's part."""
        return cell.part // self.batches * self.batches if cell.layer in self.layers else cell.part


_NO_MIXTURES = Mixtures()


@dataclass(frozen=True)
class StageLayers:
    """The contiguous layers of one stage, out of a model of `num_layers` decoder layers.

    Layer 0 embeds, layers 1 to num_layers decode, layer num_layers + 1 is the head. In a pipeline
    the schedule calls the layer before a stage's first one its entry, and the layer after its last
    one its exit.
    """

    first: int
    last: int
    num_layers: int

    @staticmethod
    def whole(num_layers: int) -> StageLayers:
        """The one stage that is the whole model."""
        return StageLayers(0, num_layers + 1, num_layers)

    @staticmethod
    def split(num_layers: int, counts: Sequence[int]) -> list[StageLayers]:
        """Divide a model into stages of `counts` decoder layers; the last also has the head.

        Raises ValueError if a stage has no decoder layer, or the counts don't sum to num_layers.
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
        """The device slot of a layer's streamed weights; the embedding has none."""
        if self.kind(layer) != "decoder":
            return HEAD_SLOT
        return (visit * len(self.decoders) + layer - self.decoders.start) % LAYER_SLOTS

    def kind(self, layer: int) -> str:
        """The role of a layer: embedding, entry, decoder, exit or head."""
        if layer not in self.layers:
            return "entry" if layer < self.first else "exit"
        if layer == 0:
            return "embedding"
        return "head" if layer == self.num_layers + 1 else "decoder"


def zigzag(
    stage: StageLayers,
    num_batches: int,
    visits: Iterable[int],
    num_blocks: int = 1,
    mixtures: Mixtures = _NO_MIXTURES,
) -> Iterator[Op]:
    """Yield the ops of a stage in program order, for visits 0, 1, 2, …; endless, if `visits` is.

    Blocks take turns: visit v belongs to block v % num_blocks, and each block has num_batches
    batches. Only the COMPOSE ops of a visit find out whether it has rows: the visit after a job's
    last one has none. The last prefetches are wasted: they load weights for a visit that never
    comes.
    """
    weights, finisher = _WeightStream(stage, num_batches), _Finisher(stage, num_batches, mixtures)
    yield from weights.prologue()
    yield from finisher.experts.prologue()
    cell: Op | None = None
    for following in _cells(stage, num_batches, visits, num_blocks):
        if cell is None:
            yield from _begin(following, stage)
        else:
            yield from weights.prefetch(cell)
            # The next layer's first cell may need the hidden states that this one completes.
            needs = not following.part and not mixtures.first_of_part(cell)
            if not needs:
                yield from _begin(following, stage)
            yield from finisher.finish(cell)
            if needs:
                yield from _begin(following, stage)
        cell = following
    if cell is not None:
        yield from weights.prefetch(cell)
        yield from finisher.finish(cell)


def _cells(
    stage: StageLayers, num_batches: int, visits: Iterable[int], num_blocks: int
) -> Iterator[Op]:
    """Yield one op per cell, from which the other ops of the cell are copied."""
    number = 0
    for visit in visits:
        turn, block = divmod(visit, num_blocks)
        # Hidden states of two blocks lie between layers at a time: one block's last batches leave
        # while the next block's first ones enter.
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
    """Ops up to a cell's attention, and before those, in a batch's first cell, its entry."""
    if cell.layer == stage.decoders[0]:
        yield from _ops(cell, _ENTER[stage.kind(cell.layer - 1)], cell.layer - 1)
    yield from _ops(cell, _BEGIN, cell.layer)


class _Finisher:
    """Ops after a cell's attention, and after those, in a batch's last cell, its exit.

    A mixture's cells wait for the last one of their part.
    """

    def __init__(self, stage: StageLayers, num_batches: int, mixtures: Mixtures) -> None:
        self.stage = stage
        self.num_batches = num_batches
        self.mixtures = mixtures
        self.experts = _ExpertStream(stage, mixtures)
        self._waiting: list[Op] = []

    def finish(self, cell: Op) -> Iterator[Op]:
        """Finish a cell, or the cells of its part, if it is the last of them."""
        if cell.layer not in self.mixtures.layers:
            yield from _ops(cell, (OpKind.FINISH, *_HIDDEN_HOME), cell.layer)
            yield from self._leave(cell)
            return
        yield from _ops(cell, (OpKind.OUT,), cell.layer)
        self._waiting.append(cell)
        end = self.mixtures.first_of_part(cell) + self.mixtures.batches
        if cell.part + 1 not in (end, self.num_batches):
            return
        part = replace(cell, kind=OpKind.EXPERTS, batches=len(self._waiting), ends_visit=False)
        yield from self.experts.run(part)
        for each in self._waiting:
            # In a part of several batches hidden states lie in no cell slot.
            yield replace(each, kind=OpKind.COMBINE, cell_slot=cell.cell_slot, ends_visit=False)
            yield from _ops(each, _HIDDEN_HOME, cell.layer)
            yield from self._leave(each)
        self._waiting.clear()

    def _leave(self, cell: Op) -> Iterator[Op]:
        """Ops that take a batch out of the stage, in its last cell."""
        if cell.layer == self.stage.decoders[-1]:
            yield from _ops(cell, _LEAVE[self.stage.kind(cell.layer + 1)], cell.layer + 1)


class _ExpertStream:
    """Endless sequence of groups of experts that stream, visit after visit, layer after layer.

    Groups are numbered on. Each goes to the slot that the one `slots` before it has left, so it is
    loaded as soon as that one has run, and read from disk a little before.
    """

    def __init__(self, stage: StageLayers, mixtures: Mixtures) -> None:
        self.slots = mixtures.slots
        self.groups = mixtures.groups
        self._streamed = [
            (layer, group)
            for layer in stage.decoders
            if layer in mixtures.groups
            for group in range(mixtures.groups[layer][0], sum(mixtures.groups[layer]))
        ]
        self._places = {each: place for place, each in enumerate(self._streamed)}

    def prologue(self) -> Iterator[Op]:
        """Loads of the first groups, for which there is memory at once."""
        if self._streamed:
            for number in range(EXPERT_STAGING_SLOTS):
                yield self._op(OpKind.READ_EXPERTS, number)
            for number in range(self.slots):
                yield from self._move(number)

    def run(self, part: Op) -> Iterator[Op]:
        """A part's experts, group by group, and the load of the group that may follow each."""
        if part.layer not in self.groups:
            yield part
            return
        for group in range(sum(self.groups[part.layer])):
            place = self._places.get((part.layer, group))
            if place is None:
                yield replace(part, group=group, expert_slot=self.slots)
                continue
            number = part.visit * len(self._streamed) + place
            yield replace(part, group=group, expert_slot=number % self.slots)
            yield from self._move(number + self.slots)

    def _move(self, number: int) -> Iterator[Op]:
        """Load a group, and read a later one into the staging slot that the load frees."""
        yield self._op(OpKind.LOAD_EXPERTS, number)
        yield self._op(OpKind.READ_EXPERTS, number + EXPERT_STAGING_SLOTS)

    def _op(self, kind: OpKind, number: int) -> Op:
        visit, place = divmod(number, len(self._streamed))
        layer, group = self._streamed[place]
        return Op(
            kind, visit, layer, batch=0,
            cell_slot=0,
            weights_slot=0,
            staging_slot=number % EXPERT_STAGING_SLOTS,
            group=group,
            expert_slot=number % self.slots,
        )  # fmt: skip


def _ops(cell: Op, kinds: Sequence[OpKind], layer: int) -> Iterator[Op]:
    """Ops of these kinds for a cell's batch, in the cell's layer or in one next to it.

    The last op of the last cell ends the visit.
    """
    weights_slot = cell.weights_slot if layer == cell.layer else HEAD_SLOT
    for kind in kinds:
        yield Op(
            kind, cell.visit, layer, cell.batch, cell.cell_slot, weights_slot,
            cell.hidden_slot, cell.turn, cell.part,
            ends_visit=cell.ends_visit and layer > cell.layer and kind is kinds[-1],
        )  # fmt: skip


class _WeightStream:
    """Endless sequence of the parts of a stage's weights: visit after visit, layer after layer.

    Parts are numbered on, num_batches parts a layer. A part is loaded one layer ahead of its use,
    and read from disk as many parts before that as there are staging slots in host memory. The
    head's parts are loaded all together, in the first cell of the last decoder layer.
    """

    def __init__(self, stage: StageLayers, num_batches: int) -> None:
        self.stage = stage
        self.layers = stage.with_weights
        self.num_batches = num_batches
        self.staging_slots = staging_slots(num_batches)

    def prologue(self) -> Iterator[Op]:
        """Loads of the first layer, which no earlier cell can hide."""
        for number in range(self.staging_slots):
            yield self._op(OpKind.READ_WEIGHTS, number)
        for number in range(self.num_batches):
            yield from self._move(number)

    def prefetch(self, cell: Op) -> Iterator[Op]:
        """A part of the next decoder layer's weights, and before it all of the head's, if next."""
        ordinal = cell.visit * len(self.layers) + cell.layer - self.layers.start + 1
        if self.layers[-1] == cell.layer + 1 and self.stage.kind(cell.layer + 1) == "head":
            if not cell.part:
                for part in range(self.num_batches):
                    yield from self._move(ordinal * self.num_batches + part)
            ordinal += 1
        yield from self._move(ordinal * self.num_batches + cell.part)

    def _move(self, number: int) -> Iterator[Op]:
        """Load a part, and read a later part into the staging slot that the load frees."""
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
