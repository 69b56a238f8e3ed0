"""Laws of the zig-zag stream: of program order, and of every execution that the rule allows."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_laws import assert_reads_what_arrived, play, streams

from flexgen_ray.schedule.dependencies import Buffer, reads, writes
from flexgen_ray.schedule.ops import CELL_SLOTS, WEIGHTS_SLOTS, Op, OpKind, staging_slots
from flexgen_ray.schedule.zigzag import Mixtures, StageLayers, zigzag

COMPUTE = (OpKind.PROJECT, OpKind.FINISH, OpKind.OUT, OpKind.EXPERTS)


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_every_compute_reads_its_own_weights_whole(stream, seed):
    with_weights = stream[0].with_weights
    assert_reads_what_arrived(
        stream,
        seed,
        OpKind.LOAD_WEIGHTS,
        lambda op: op.kind in COMPUTE and op.layer in with_weights,
        lambda op: op.weights_slot,
        lambda move, op: (move.visit, move.layer) == (op.visit, op.layer),
    )


GROUPS = Mixtures(frozenset({1, 2, 4}), 4, {1: (1, 2), 2: (0, 3), 4: (0, 1)}, 2)


@given(streams(GROUPS), st.integers(0, 2**32))
@settings(max_examples=40)
def test_a_group_of_experts_is_there_when_it_runs_and_crosses_once_a_visit(stream, seed):
    stage, _, num_visits, ops = stream
    streamed = {
        (layer, resident + number)
        for layer, (resident, count) in GROUPS.groups.items()
        for number in range(count)
        if layer in stage.decoders
    }

    def is_group(move, op):
        return (move.visit, move.layer, move.group) == (op.visit, op.layer, op.group)

    if streamed:
        assert_reads_what_arrived(
            stream,
            seed,
            OpKind.LOAD_EXPERTS,
            lambda op: op.kind is OpKind.EXPERTS and (op.layer, op.group) in streamed,
            lambda op: op.expert_slot,
            is_group,
        )
        assert_reads_what_arrived(
            stream,
            seed,
            OpKind.READ_EXPERTS,
            lambda op: op.kind is OpKind.LOAD_EXPERTS,
            lambda op: op.staging_slot,
            is_group,
        )
    for kind in (OpKind.LOAD_EXPERTS, OpKind.EXPERTS):
        runs = [(op.visit, op.layer, op.group) for op in ops if op.kind is kind]
        assert len(runs) == len(set(runs))
        wanted = {(visit, *it) for visit in range(num_visits) for it in streamed}
        assert wanted <= set(runs)


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_a_part_is_in_host_memory_whole_before_it_crosses_the_link(stream, seed):
    assert_reads_what_arrived(
        stream,
        seed,
        OpKind.READ_WEIGHTS,
        lambda op: op.kind is OpKind.LOAD_WEIGHTS,
        lambda op: op.staging_slot,
        lambda move, op: (move.visit, move.layer, move.part) == (op.visit, op.layer, op.part),
    )


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=40)
def test_values_are_loaded_when_they_are_chosen_and_attended_when_they_are_there(stream, seed):
    steps = (OpKind.CHOOSE, OpKind.GATHER_VALUES, OpKind.LOAD_VALUES, OpKind.ATTEND_DEVICE)
    for mover, reader in pairwise(steps):
        assert_reads_what_arrived(
            stream,
            seed,
            mover,
            lambda op, reader=reader: op.kind is reader,
            lambda op: op.cell_slot,
            lambda move, op: (move.visit, move.layer, move.batch) == (op.visit, op.layer, op.batch),
        )


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=40)
def test_no_slot_is_overwritten_before_its_last_reader(stream, seed):
    """Brute force over pairs: conflicting ops of different cells never overlap nor change order."""
    _, _, _, ops = stream
    times = play(ops, seed)
    touched = defaultdict(list)
    for index, op in enumerate(ops):
        for slot in set(reads(op)) | set(writes(op)):
            touched[slot].append((index, slot in writes(op), slot in reads(op)))
    for indices in touched.values():
        for place, (i, i_writes, i_reads) in enumerate(indices):
            for j, j_writes, j_reads in indices[place + 1 :]:
                together = _cell(ops[i]) == _cell(ops[j]) and not (i_reads or j_reads)
                if (i_writes or j_writes) and not together:
                    assert times[i][1] <= times[j][0], (ops[i], ops[j])


def _cell(op: Op) -> tuple[int, ...]:
    is_part = op.kind is OpKind.LOAD_WEIGHTS
    return (op.visit, op.layer) if is_part else (op.visit, op.layer, op.batch)


@given(streams())
@settings(max_examples=100)
def test_each_streamed_weight_crosses_the_link_once_a_visit(stream):
    stage, num_batches, num_visits, ops = stream
    crossed = defaultdict(list)
    for op in ops:
        if op.kind is OpKind.LOAD_WEIGHTS:
            crossed[op.visit, op.layer].append(op.part)
    for visit in range(num_visits):
        for layer in stage.with_weights:
            assert crossed[visit, layer] == list(range(num_batches))
    in_vain = [key for key in crossed if key[0] >= num_visits]
    assert in_vain == [(num_visits, stage.with_weights[0])]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**32))
def test_a_pass_is_composed_when_its_tokens_are_known(num_layers, num_batches, num_visits, seed):
    """And of several batches without waiting for the others' tokens."""
    ops = list(zigzag(StageLayers.whole(num_layers), num_batches, range(num_visits)))
    times = play(ops, seed)
    place = {(op.kind, op.visit, op.batch): index for index, op in enumerate(ops)}
    composed = [(op.visit, op.batch) for op in ops if op.kind is OpKind.COMPOSE]
    assert composed == [(v, b) for v in range(num_visits) for b in range(num_batches)]
    for visit, batch in composed[num_batches:]:
        accepted = place[OpKind.ACCEPT, visit - 1, batch]
        assert times[accepted][1] <= times[place[OpKind.COMPOSE, visit, batch]][0]
    if num_batches > 1:
        last = place[OpKind.ACCEPT, 0, num_batches - 1]
        assert place[OpKind.COMPOSE, 1, 0] < last
        assert ops[last].ends_visit and sum(op.ends_visit for op in ops) == num_visits


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_a_batch_passes_the_layers_in_order(stream, seed):
    """Its cell of a layer begins when the layer before has finished it."""
    ops = stream[3]
    times = play(ops, seed)
    finished = {}
    for op, (start, end) in zip(ops, times, strict=True):
        if op.kind in (OpKind.PROJECT, OpKind.FINISH, OpKind.OUT):
            assert finished[op.visit, op.layer - 1, op.batch] <= start
        if op.kind in (OpKind.EMBED, OpKind.FINISH, OpKind.COMBINE):
            finished[op.visit, op.layer, op.batch] = end


@given(streams(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_experts_run_once_for_the_rows_that_a_part_has_brought(stream, seed):
    """Each batch brings its rows, the experts take them, and it gets them back."""
    _, num_batches, _, ops = stream
    times = play(ops, seed)
    brought, taken = {}, {}
    for op, (start, end) in zip(ops, times, strict=True):
        cell = op.visit, op.layer, op.batch
        match op.kind:
            case OpKind.OUT:
                brought[cell] = end
            case OpKind.EXPERTS:
                assert op.batch // num_batches == (op.batch - op.batches + 1) // num_batches
                for batch in range(op.batch - op.batches + 1, op.batch + 1):
                    cell = op.visit, op.layer, batch
                    since = taken[cell] if op.group else brought.pop(cell)
                    assert since <= start
                    taken[cell] = end
                assert not brought
            case OpKind.COMBINE:
                assert taken.pop(cell) <= start
    assert not brought and not taken


@given(st.integers(2, 4), st.integers(2, 5))
def test_the_next_batch_is_attended_before_this_one_finishes(num_batches, num_layers):
    """The order that lets host attention hide behind the device's work."""
    ops = list(zigzag(StageLayers.whole(num_layers), num_batches, range(1)))
    place = {(op.kind, op.layer, op.batch): index for index, op in enumerate(ops)}
    for layer in range(1, num_layers + 1):
        for batch in range(num_batches - 1):
            attend = place[OpKind.ATTEND_HOST, layer, batch + 1]
            assert attend < place[OpKind.FINISH, layer, batch]


@given(st.integers(2, 4), st.integers(1, 5))
def test_the_next_pass_is_attended_before_this_one_ends(num_batches, num_layers):
    """So that host attention doesn't pause while the last batch is sampled."""
    ops = list(zigzag(StageLayers.whole(num_layers), num_batches, range(2)))
    place = {(op.kind, op.visit, op.layer, op.batch): index for index, op in enumerate(ops)}
    last = place[OpKind.FINISH, 0, num_layers, num_batches - 1]
    assert place[OpKind.ATTEND_HOST, 1, 1, 0] < last


@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_stream_is_lazy(num_batches):
    """An endless job yields its first ops at once."""

    def forever():
        visit = 0
        while True:
            yield visit
            visit += 1

    ops = zigzag(StageLayers.whole(2), num_batches, forever())
    assert len(list(islice(ops, 500))) == 500


def test_slots_are_reused():
    ops = list(zigzag(StageLayers.whole(3), 2, range(3)))
    copies = {slot for op in ops for slot in (*reads(op), *writes(op))}
    counts = {
        Buffer.DEVICE_WEIGHTS: WEIGHTS_SLOTS,
        Buffer.HOST_WEIGHTS: staging_slots(2),
        Buffer.WORK: CELL_SLOTS,
        Buffer.STREAMED_CACHE: CELL_SLOTS,
    }
    for buffer, count in counts.items():
        assert sum(slot[0] is buffer for slot in copies) == count
