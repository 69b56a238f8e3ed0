"""Laws of what a stage takes from its neighbours and gives them, in every execution allowed."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_laws import assert_reads_what_arrived, mixtures, streams

from flexgen_ray.schedule.dependencies import Buffer, Dependencies, reads
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.zigzag import Mixtures, StageLayers, zigzag

TELLS_ROWS = (OpKind.COMPOSE, OpKind.RECV_ROWS)


def is_same_pass(move: Op, op: Op) -> bool:
    return (move.visit, move.batch) == (op.visit, op.batch)


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=30)
def test_what_is_sent_is_what_the_same_pass_stored(stream, seed):
    """And no other pass overwrites it before the next stage has taken it."""
    assert_reads_what_arrived(
        stream,
        seed,
        OpKind.STORE_SENT,
        lambda op: op.kind is OpKind.SEND,
        lambda op: op.hidden_slot,
        is_same_pass,
    )


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=30)
def test_what_arrived_is_taken_in_before_more_may_arrive(stream, seed):
    assert_reads_what_arrived(
        stream,
        seed,
        OpKind.GATHER if stream[0].is_first else OpKind.RECV,
        lambda op: op.kind is OpKind.LOAD_EMBEDDING,
        lambda op: op.cell_slot,
        is_same_pass,
    )


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=30)
def test_every_op_looks_up_the_rows_of_its_own_pass(stream, seed):
    """Composed or received ahead, while the batch's pass before is still under way."""
    assert_reads_what_arrived(
        stream,
        seed,
        OpKind.COMPOSE if stream[0].is_first else OpKind.RECV_ROWS,
        lambda op: any(slot[0] is Buffer.ROWS for slot in reads(op)),
        lambda op: (op.batch, op.turn),
        is_same_pass,
    )


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=30)
def test_hidden_states_at_home_are_those_of_the_layer_before(stream, seed):
    """Whichever blocks take turns with their two homes."""
    assert_reads_what_arrived(
        stream,
        seed,
        {OpKind.EMBED, OpKind.FINISH, OpKind.COMBINE},
        lambda op: op.kind is OpKind.PROJECT,
        lambda op: op.hidden_slot,
        lambda move, op: is_same_pass(move, op) and move.layer == op.layer - 1,
    )


@st.composite
def rings(draw) -> tuple[list[StageLayers], int]:
    """The stages of a model, two at least, and their batches."""
    counts = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    return StageLayers.split(sum(counts), counts), draw(st.integers(1, 3))


def passes(ops: list[Op], kind: OpKind) -> list[tuple[int, int]]:
    return [(op.visit, op.batch) for op in ops if op.kind is kind]


@given(rings(), st.integers(0, 2), st.integers(1, 8), mixtures())
def test_a_stage_takes_in_the_order_in_which_the_one_before_gives(ring, spare, num_visits, parts):
    """Messages carry no address: the first stage's tokens too come in the order it expects."""
    stages, num_batches = ring
    num_blocks = len(stages) + spare
    visits = range(num_visits)
    streams = [list(zigzag(it, num_batches, visits, num_blocks, parts)) for it in stages]
    composed = passes(streams[0], OpKind.COMPOSE)
    for before, after in zip(streams, streams[1:], strict=False):
        assert passes(after, OpKind.RECV_ROWS) == composed
        assert passes(before, OpKind.SEND) == passes(after, OpKind.RECV)
    chosen = passes(streams[-1], OpKind.ACCEPT)
    expected = [(v - num_blocks, batch) for v, batch in passes(streams[0], OpKind.RECV_TOKENS)]
    later = [it for it in expected if it[0] >= 0]
    assert later == chosen[: len(later)]


@given(rings(), st.integers(1, 4))
def test_blocks_take_turns_with_batches_of_their_own(ring, num_blocks):
    """None has another's cache; and a block's next rows can be there while its last are in use."""
    stages, num_batches = ring
    for stage in stages:
        turns: dict[int, set[int]] = {}
        for op in zigzag(stage, num_batches, range(3 * num_blocks), num_blocks):
            if op.kind in (OpKind.READ_WEIGHTS, OpKind.LOAD_WEIGHTS):
                continue
            assert op.batch // num_batches == op.visit % num_blocks
            turns.setdefault(op.visit, set()).add(op.turn)
        for visit in range(2 * num_blocks):
            assert len(turns[visit]) == 1 and turns[visit] != turns[visit + num_blocks]


def waits(ring, num_blocks: int, num_visits: int, in_program_order: bool, parts=None) -> dict:
    """{(stage, op, begins or ends): what must have happened before}, in a whole ring."""
    stages, num_batches = ring
    graph: dict = {}
    place: dict = {}
    for number, stage in enumerate(stages):
        dependencies: Dependencies[int] = Dependencies()
        last: dict = {}
        ops = zigzag(stage, num_batches, range(num_visits), num_blocks, parts or Mixtures())
        for index, op in enumerate(ops):
            place[number, op.kind, op.visit, op.batch] = number, index
            before = {last.get(None if in_program_order else op.lane)} - {None}
            before |= dependencies.add(index, op)
            graph[number, index, "begins"] = {(number, it, "ends") for it in before}
            graph[number, index, "ends"] = {(number, index, "begins")}
            last[None if in_program_order else op.lane] = index
    for (number, kind, visit, batch), (_, index) in place.items():
        ends = graph[number, index, "ends"]
        if kind is OpKind.RECV_ROWS:
            told = TELLS_ROWS[number > 1]
            ends.add((*place[number - 1, told, visit, batch], "ends"))
        elif kind is OpKind.RECV:
            # Both ends of what is sent are there at the same time.
            sent = place[number - 1, OpKind.SEND, visit, batch]
            ends.add((*sent, "begins"))
            graph[(*sent, "ends")].add((number, index, "begins"))
        elif kind is OpKind.RECV_TOKENS and visit >= num_blocks:
            accepted = place[len(stages) - 1, OpKind.ACCEPT, visit - num_blocks, batch]
            ends.add((*accepted, "ends"))
    return graph


@pytest.mark.parametrize("in_program_order", [True, False])
@given(rings(), st.integers(0, 2), mixtures())
@settings(max_examples=15)
def test_a_ring_with_a_block_a_stage_never_waits_for_itself(in_program_order, ring, spare, parts):
    num_blocks = len(ring[0]) + spare
    TopologicalSorter(waits(ring, num_blocks, 3 * num_blocks, in_program_order, parts)).prepare()


def test_a_ring_with_fewer_blocks_may_wait_for_itself():
    """Why policies refuse it: the next pass is begun before this one's last batch is sent."""
    ring = StageLayers.split(2, [1, 1]), 2
    with pytest.raises(CycleError):
        TopologicalSorter(waits(ring, 1, 3, in_program_order=True)).prepare()
