"""How often the schedule moves weights, against the least that any schedule could (FlexGen, 4.2).

Sequences share a trip of a layer's weights if all their caches are in memory at once; a cache grows
by a token a pass and goes when its sequence is done. What is counted is trips of weights, the
traffic that the block schedule is there to share.
"""

from __future__ import annotations

import heapq
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray.schedule.ops import OpKind
from flexgen_ray.schedule.zigzag import StageLayers, zigzag


def zigzag_trips(num_layers: int, num_tokens: int, block: int, num_sequences: int) -> int:
    """Weights that the schedule brings for one sequence a batch, block after block; the head, which
    the bound doesn't count, and what is fetched for a pass that never comes aside."""
    blocks = -(-num_sequences // block)
    ops = zigzag(StageLayers.whole(num_layers), block, range(blocks * num_tokens))
    loads = [op for op in ops if op.kind is OpKind.LOAD_WEIGHTS]
    trips = groupby(loads, key=lambda op: (op.visit, op.layer))
    return sum(visit < blocks * num_tokens and layer <= num_layers for (visit, layer), _ in trips)


def cached_tokens(done: int, num_layers: int, num_tokens: int) -> int:
    """(layer, token) pairs in the cache of a sequence that has passed so many layers in all."""
    return 0 if done == num_layers * num_tokens else done


def least_trips(num_layers: int, num_tokens: int, num_sequences: int, memory: int) -> int:
    """By shortest path: a state is how far each sequence is and whose weights are loaded; a step
    takes one sequence through its next layer. memory: in (layer, token) pairs."""
    end = num_layers * num_tokens
    start = (0,) * num_sequences, -1
    best, queue = {start: 0}, [(0, *start)]
    while queue:
        trips, state, loaded = heapq.heappop(queue)
        if all(done == end for done in state):
            return trips
        if best[state, loaded] < trips:
            continue
        for i, done in enumerate(state):
            if done == end:
                continue
            layer = done % num_layers
            after = state[:i] + (done + 1,) + state[i + 1 :]
            held = sum(cached_tokens(it, num_layers, num_tokens) for it in after)
            # While its last layer is computed, a sequence's whole cache is there.
            held += end if done + 1 == end else 0
            if held > memory:
                continue
            # Sequences are alike: only how many are how far counts.
            following = tuple(sorted(after)), layer
            cost = trips + (layer != loaded)
            if cost < best.get(following, cost + 1):
                best[following] = cost
                heapq.heappush(queue, (cost, *following))
    raise AssertionError("no schedule fits the memory")


@pytest.mark.parametrize("num_layers", [2, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 3])
@pytest.mark.parametrize(("block", "blocks"), [(1, 2), (2, 1), (2, 2), (3, 1), (1, 4)])
def test_the_schedule_takes_at_most_twice_the_trips_of_the_best_one(
    num_layers, num_tokens, block, blocks
):
    # Of a model of one layer the weights would simply stay.
    memory = block * num_layers * num_tokens
    least = least_trips(num_layers, num_tokens, block * blocks, memory)
    assert zigzag_trips(num_layers, num_tokens, block, block * blocks) <= 2 * least


@given(
    st.integers(0, 60),
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 5),
)
@settings(max_examples=60)
def test_the_schedule_is_within_twice_the_bound(prompt, tokens, block, blocks, num_layers):
    """A trip of a layer's weights takes each sequence in memory one token further, and then the
    layer's caches of all these are there: so there are at least as many trips as the bytes that all
    these steps need over those there are."""
    memory = block * (prompt + tokens)
    needed = block * blocks * sum(prompt + token for token in range(1, tokens + 1))
    bound = num_layers * needed / memory
    assert bound <= zigzag_trips(num_layers, tokens, block, block * blocks) <= 2 * bound
