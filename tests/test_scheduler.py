"""Laws of the batcher: every token passes once, in order, within the room there is."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from flexgen_ray.config import PAGE_TOKENS, Policy, Workload
from flexgen_ray.layout.admission import Admission
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.prefixes import find_prefixes, measure_sharing
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.zigzag import StageLayers

END = 7
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 12))
jobs = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), max_size=25)


def make(shape, job) -> tuple[Scheduler, list[Request]]:
    batch_size, batches, spare = shape
    batcher = Scheduler(batch_size, batches, batch_size + spare, frozenset([END]))
    requests = [
        Request(index, list(range(100, 100 + prompt)), SamplingParams(max_tokens, 0.0))
        for index, (prompt, max_tokens) in enumerate(job)
    ]
    batcher.add(requests)
    return batcher, requests


@given(shapes, jobs, st.integers(0, 2**32))
def test_every_token_passes_once_and_every_request_finishes_once(shape, job, seed):
    rng = random.Random(seed)
    batcher, requests = make(shape, job)
    passed: dict[int, list[int]] = {request.index: [] for request in requests}
    finished = {}
    while not batcher.is_done:
        for batch in range(shape[1]):
            rows = batcher.compose(batch)
            assert rows.num_tokens <= batcher.cell_tokens
            slots = [row.slot for row in rows.rows]
            # Rows that decode come first.
            order = [(row.is_prefill, row.slot) for row in rows.rows]
            assert order == sorted(order) and len(set(slots)) == len(slots)
            assert all(0 <= slot < shape[0] for slot in slots)
            indices = batcher.request_indices(batch, slots)
            for row, index in zip(rows.rows, indices, strict=True):
                assert row.position == len(passed[index])
                passed[index] += rows.token_ids[row.tokens]
            sampled = [row.slot for row in rows.sampled]
            batcher.accept(batch, sampled, [rng.randint(5, 9) for _ in sampled])
        for done in batcher.take_finished():
            assert done.index not in finished
            finished[done.index] = done
    assert set(finished) == {request.index for request in requests}
    for request in requests:
        done = finished[request.index]
        # The last token is the answer's end; nothing has to be computed from it.
        assert passed[request.index] == request.prompt_token_ids + done.token_ids[:-1]
        stopped = done.token_ids[-1] == END
        assert done.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(done.token_ids) == request.params.max_tokens
        assert END not in done.token_ids[:-1]


@given(shapes, jobs)
def test_at_most_one_prompt_of_a_batch_is_under_way(shape, job):
    """The cache's streaming slot has one place to spare for it."""
    batcher, _ = make(shape, job)
    while not batcher.is_done:
        for batch in range(shape[1]):
            rows = batcher.compose(batch)
            assert sum(row.position > 0 and row.is_prefill for row in rows.rows) <= 1
            sampled = [row.slot for row in rows.sampled]
            batcher.accept(batch, sampled, [5] * len(sampled))
        list(batcher.take_finished())


@given(shapes, jobs)
def test_the_longest_come_first_and_a_free_slot_is_taken_at_the_next_pass(shape, job):
    batch_size, batches, _ = shape
    batcher, requests = make((batch_size, batches, batch_size * 30), job)
    left = {request.index: len(request.prompt_token_ids) for request in requests}
    met: list[int] = []
    while not batcher.is_done:
        for batch in range(batches):
            rows = batcher.compose(batch)
            slots = [row.slot for row in rows.rows]
            share = min(batch_size, -(-len(left) // batches))
            assert share <= len(slots) <= batch_size or not batcher._waiting
            for index in batcher.request_indices(batch, slots):
                if index not in met:
                    met.append(index)
            # Every second row ends.
            sampled = [row.slot for row in rows.sampled]
            tokens = [END if slot % 2 else 5 for slot in sampled]
            batcher.accept(batch, sampled, tokens)
            for done in batcher.take_finished():
                del left[done.index]
    lengths = [requests[index].max_seq_len for index in met]
    assert lengths == sorted(lengths, reverse=True)


def test_the_only_slot_of_a_batch_is_a_ready_row_s_before_another_group_s_prefix():
    """Two groups of two rows each: prefix, rows, prefix, rows."""
    params, config = SamplingParams(2, 0.0), shape_config("opt-125m")
    shared = [[group] * (5 * PAGE_TOKENS) for group in (1, 2)]
    requests = [Request(number, [*shared[number // 2], 10 + number], params) for number in range(4)]
    sharing = measure_sharing(requests, find_prefixes(requests))
    workload = Workload(4, 5 * PAGE_TOKENS + 1, 5 * PAGE_TOKENS + 3, sharing=sharing)
    stage = StageLayers.whole(config.num_layers)
    plan = StagePlan(config, stage, Policy(1), workload, "float32")
    admission = Admission([plan.space])
    scheduler = Scheduler(1, 1, plan.cell_tokens, frozenset([END]), admission=admission)
    scheduler.add(requests)
    begun: list[int] = []
    while not scheduler.is_done:
        rows = scheduler.compose(0)
        slots = [row.slot for row in rows.sampled]
        begun += [*rows.token_ids[:1]] if rows.entered else []
        scheduler.accept(0, slots, [5] * len(slots))
        list(scheduler.take_finished())
    assert begun == [1, 10, 11, 2, 12, 13]
