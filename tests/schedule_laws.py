"""Streams of ops, and a law that those of one stage and of a ring obey."""

from __future__ import annotations

import random
from collections import defaultdict

from hypothesis import strategies as st

from flexgen_ray.schedule.dependencies import Dependencies
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.zigzag import Mixtures, StageLayers, zigzag


@st.composite
def mixtures(draw, num_layers: int = 5) -> Mixtures:
    """Some layers that are mixtures, and the batches for which their experts run.

    Or all of a block's, if groups of experts stream apart from their layers.
    """
    layers = draw(st.frozensets(st.integers(1, num_layers)))
    if draw(st.booleans()):
        return Mixtures(layers, draw(st.integers(1, 4)))
    counts = st.tuples(st.integers(0, 2), st.integers(0, 3)).filter(any)
    groups = {layer: draw(counts) for layer in sorted(layers)}
    return Mixtures(layers, 4, groups, draw(st.integers(2, 3)))


ANY_PARTS = mixtures()


@st.composite
def streams(draw, parts=ANY_PARTS) -> tuple[StageLayers, int, int, list[Op]]:
    """A stage (whole model, or a first, middle or last part), its batches, visits and ops.

    Blocks, up to three, take turns. parts: Mixtures, or a strategy for them.
    """
    num_layers = draw(st.integers(1, 5))
    first = draw(st.integers(0, num_layers))
    last = draw(st.integers(max(first, 1), num_layers + 1))
    stage = StageLayers(first, last, num_layers)
    num_batches, num_visits = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    num_blocks = draw(st.integers(1, 3))
    parts = parts if isinstance(parts, Mixtures) else draw(parts)
    ops = zigzag(stage, num_batches, range(num_visits), num_blocks, parts)
    return stage, num_batches, num_visits, list(ops)


def play(ops: list[Op], seed: int) -> list[tuple[float, float]]:
    """(start, end) of each op under the rule, with random durations: some lanes far slower."""
    rng = random.Random(seed)
    pace = defaultdict(lambda: rng.choice([0.1, 1.0, 10.0]))
    dependencies, lane_free, times = Dependencies(), defaultdict(float), []
    for index, op in enumerate(ops):
        waits = [times[i][1] for i in dependencies.add(index, op)]
        start = max([lane_free[op.lane], *waits])
        end = start + rng.random() * pace[op.lane]
        lane_free[op.lane] = end
        times.append((start, end))
    return times


def assert_reads_what_arrived(stream, seed: int, mover, is_reader, slot, own) -> None:
    """All of a reader's own moves are in its slot when it starts, and stay until it is done.

    mover: the kind that moves, or kinds.
    """
    ops, movers = stream[3], {mover} if isinstance(mover, OpKind) else mover
    times = play(ops, seed)
    moves = [(op, *t) for op, t in zip(ops, times, strict=True) if op.kind in movers]
    for op, (start, end) in zip(ops, times, strict=True):
        if not is_reader(op):
            continue
        arrived = [x for x in moves if own(x[0], op)]
        assert arrived and all(slot(x[0]) == slot(op) for x in arrived)
        assert all(x[2] <= start for x in arrived)
        others = [x for x in moves if slot(x[0]) == slot(op) and x not in arrived]
        first = min(x[1] for x in arrived)
        assert all(x[2] <= first or x[1] >= end for x in others)
