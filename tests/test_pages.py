"""Pages of the cache: handed out once, given back whole, the same in every stage; none is lost."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import opt, policies

from flexgen_ray.config import PAGE_TOKENS, TIERS, Budget, Placement, Policy, Workload
from flexgen_ray.layout import admission
from flexgen_ray.layout.admission import Admission
from flexgen_ray.layout.pages import ALL_PAGES, Home, LayerKind, PagePool, StagePages, pages_of
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Row, Rows, cut_at_pages
from flexgen_ray.layout.sizes import check_budget, stage_bytes, tier_totals
from flexgen_ray.planner.fill import with_spare_pages
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.store.new_tokens import NewTokens, append_tokens

MODEL = opt(2, 32, 2)
# Layers that attend all tokens, that attend within a window, and one of each.
MODELS = (
    MODEL,
    replace(MODEL, sliding_window=20),
    replace(MODEL, sliding_window=20, full_attention_layers=(1,)),
)


@given(st.integers(1, 40), st.lists(st.integers(1, 12), max_size=30), st.randoms())
def test_a_page_has_one_owner_and_free_ones_join_their_neighbours(count, sizes, rng):
    pool, owned = PagePool(count), []
    for size in sizes:
        while pool.free < size and owned:
            pool.give(owned.pop(rng.randrange(len(owned))))
        if pool.free >= size:
            owned.append(pool.take(size))
        held = [page for pages in owned for page in pages]
        assert len(set(held)) == len(held) == count - pool.free
        assert all(0 <= page < count for page in held)
    for pages in owned:
        pool.give(pages)
    # A whole pool is one run again.
    assert pool.take(count) == tuple(range(count))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True), st.data())
def test_runs_are_the_pages_in_order(pages, data):
    home = Home("cpu", tuple(pages))
    first = data.draw(st.integers(0, len(pages)))
    last = data.draw(st.integers(first, len(pages)))
    runs = list(home.runs(first, last))
    listed = [page + i for _, page, count in runs for i in range(count)]
    assert listed == pages[first:last]
    assert [index for index, _, _ in runs] == [
        first + sum(count for _, _, count in runs[:number]) for number in range(len(runs))
    ]
    assert all(a[1] + a[2] != b[1] for a, b in zip(runs, runs[1:], strict=False))


def plan_of(policy: Policy, blocks: int, longest: int, mean: float, model=MODEL) -> StagePlan:
    workload = Workload(99, longest // 2 + 1, longest, mean_seq_len=mean)
    return StagePlan(model, StageLayers.whole(2), policy, workload, "float32", num_blocks=blocks)


@st.composite
def jobs(draw) -> tuple[StagePlan, list[int]]:
    """A plan, and the final lengths of its requests, of which one is the longest."""
    lens = draw(st.lists(st.integers(2, 200), min_size=1, max_size=25))
    policy, blocks, model = draw(policies), draw(st.integers(1, 2)), draw(st.sampled_from(MODELS))
    return plan_of(policy, blocks, max(lens), sum(lens) / len(lens), model), lens


@given(jobs())
def test_memory_that_is_left_holds_what_the_longest_rows_under_way_become_and_no_more(job):
    plan, lens = job
    rows, ample = plan.num_batches * plan.policy.gpu_batch_size, [Budget(2**60, 2**60, 2**60)]
    longest = sorted(map(pages_of, lens))[-rows:]
    needed = sum(longest)
    (roomy,) = with_spare_pages([plan], ample, lens)
    for kind, pools in zip(roomy.kinds, roomy.space.pools, strict=True):
        assert sum(pools) >= sum(min(pages, kind.most_pages) for pages in longest)
    assert roomy.row_pages == max(plan.row_pages, min(-(-needed // rows), plan.longest_pages))
    (unknown,) = with_spare_pages([plan], ample)
    assert unknown.row_pages == plan.longest_pages
    none_left = tier_totals(stage_bytes(plan))
    (tight,) = with_spare_pages([plan], [none_left], lens)
    check_budget(tight, none_left)


def request_of(index: int, length: int) -> Request:
    prompt = [5] * max(1, length // 3)
    return Request(index, prompt, SamplingParams(length - len(prompt), 0.0, ignore_eos=True))


def scheduler_of(plans: list[StagePlan], ends: frozenset[int] = frozenset()) -> Scheduler:
    plan = plans[0]
    return Scheduler(
        plan.policy.gpu_batch_size, plan.num_batches, plan.cell_tokens, ends,
        admission=Admission([each.space for each in plans]),
    )  # fmt: skip


class Homes:
    """Homes of a stage's rows, as the events of the passes say."""

    def __init__(self, plan: StagePlan, number: int = 0) -> None:
        self.plan, self.number = plan, number
        self.pages = StagePages(plan.space)
        self.held: dict[tuple[int, int], tuple[Home, ...]] = {}

    def apply(self, batch: int, rows: Rows) -> None:
        for slot, *there in rows.moved:
            self.pages.move(tuple(there), (batch, slot))
            self.held[batch, slot] = self.held.pop(tuple(there))
        for slot in rows.left:
            self.pages.leave(batch, slot)
            del self.held[batch, slot]
        for slot, count in rows.grown:
            self.pages.grow(batch, slot, count)
        for slot, count, tiers, _ in rows.entered:
            self.pages.enter(batch, slot, count, TIERS[tiers[self.number]])
        for slot, *_ in (*rows.grown, *rows.entered):
            self.held[batch, slot] = self.pages.homes(batch, slot)
        for kind in self.plan.kinds:
            for row in rows.rows:
                pages = len(self.held[batch, row.slot][kind.number].pages)
                assert kind.pages_of(row.seq_len) <= pages <= kind.most_pages
            self._assert_within(batch, kind.number)

    def _assert_within(self, batch: int, kind: int) -> None:
        plan, held = self.plan, {key: homes[kind] for key, homes in self.held.items()}
        owners = Counter((home.tier, page) for home in held.values() for page in home.pages)
        assert not owners or max(owners.values()) == 1
        for tier, count in zip(TIERS, plan.space.pools[kind], strict=True):
            assert all(page < count for of_tier, page in owners if of_tier == tier)
        own = [home for (of_batch, _), home in held.items() if of_batch == batch]
        of_tier = {tier: sum(len(it.pages) for it in own if it.tier == tier) for tier in TIERS}
        must_stream = of_tier["disk"] + of_tier["cpu"] * (plan.policy.cpu_attention == 0)
        assert must_stream <= plan.slot_pages and of_tier["disk"] <= plan.space.disk
        tails = [home.tail for home in held.values() if home.tail >= 0]
        assert len(set(tails)) == len(tails) <= plan.space.disk_rows


@settings(max_examples=60)
@given(jobs(), policies, st.randoms(use_true_random=False), st.booleans())
def test_every_request_ends_and_no_pool_nor_slot_is_exceeded(job, other, rng, are_misjudged):
    """In two stages, whichever rows end early, and if admission lets too many in."""
    plan, lens = job
    policy = replace(plan.policy, cache=other.cache, cpu_attention=other.cpu_attention)
    plans = [plan, replace(plan, policy=policy)]
    scheduler, stages = scheduler_of(plans, frozenset({7})), [*map(Homes, plans, range(2))]
    scheduler.add(request_of(*each) for each in enumerate(lens))
    tokens = Counter()
    with pytest.MonkeyPatch.context() as patch:
        if are_misjudged:
            patch.setattr(admission, "peak_pages", lambda *_: 0)
        for _ in range(40 * sum(lens)):
            if scheduler.is_done:
                break
            for batch in range(plan.num_batches):
                rows = scheduler.compose(batch)
                for stage in stages:
                    stage.apply(batch, rows)
                slots = [row.slot for row in rows.sampled]
                tokens.update(scheduler.request_indices(batch, slots))
                scheduler.accept(batch, slots, [rng.choice([3, 3, 3, 7]) for _ in slots])
    assert scheduler.is_done
    finished = {it.index: it for it in scheduler.take_finished()}
    assert sorted(finished) == list(range(len(lens)))
    assert all(len(it.token_ids) == tokens[index] for index, it in finished.items())


@settings(max_examples=40)
@given(jobs())
def test_nothing_is_computed_again_if_lengths_are_known(job):
    """A batch's prompts in one pass, so that all rows get a token in each."""
    plan, lens = job
    policy = replace(plan.policy, max_batch_tokens=10_000)
    plan = replace(plan, policy=policy)
    scheduler, homes = scheduler_of([plan]), Homes(plan)
    scheduler.add(request_of(*each) for each in enumerate(lens))
    while not scheduler.is_done:
        for batch in range(plan.num_batches):
            rows = scheduler.compose(batch)
            homes.apply(batch, rows)
            assert len(rows.rows) == len(scheduler._slots[batch])
            slots = [row.slot for row in rows.sampled]
            scheduler.accept(batch, slots, [3] * len(slots))
    assert not scheduler.recomputed_tokens


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=60),
    st.sampled_from([ALL_PAGES, 3]),
)
def test_the_peak_is_that_of_every_pass_counted(pairs, most):
    rows = [SimpleNamespace(num_tokens=now, expected_tokens=now + more) for now, more in pairs]
    peak = max(
        sum(min(pages_of(it.num_tokens + after), most) for it in rows
            if it.num_tokens + after <= it.expected_tokens)
        for after in range(301)
    )  # fmt: skip
    found = admission.peak_pages(rows, most)
    assert found >= peak
    if all(pages_of(it.expected_tokens) <= most for it in rows):
        assert found == peak


@settings(max_examples=40)
@given(policies, st.integers(1, 3), st.integers(2, 100), st.sampled_from(MODELS))
def test_equal_rows_fill_every_slot_on_the_tiers_of_the_plan(policy, blocks, length, model):
    plan = plan_of(policy, blocks, length, length, model)
    scheduler, homes = scheduler_of([plan]), Homes(plan)
    count = policy.block_size * blocks
    scheduler.add(request_of(index, length) for index in range(count))
    for batch, split in enumerate(plan.splits):
        rows = scheduler.compose(batch)
        homes.apply(batch, rows)
        assert len(rows.entered) == policy.gpu_batch_size
        tiers = Counter(homes.held[batch, slot][0].tier for slot, *_ in rows.entered)
        assert tuple(tiers[tier] for tier in TIERS) == split.tiers


def test_one_long_request_leaves_the_others_their_places():
    """Where every slot was as long as the longest, this memory held three rows."""
    lens = [300] + [20] * 64
    plan = plan_of(Policy(16, 2), 1, max(lens), sum(lens) / len(lens))
    scheduler = scheduler_of([plan])
    scheduler.add(request_of(*each) for each in enumerate(lens))
    entered = [scheduler.compose(batch).entered for batch in range(2)]
    assert pages_of(100) in [count for _, count, *_ in entered[0]]
    assert sum(map(len, entered)) >= 23
    assert sum(plan.space.pages) < 4 * pages_of(300)


@settings(max_examples=60)
@given(
    chunks=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.uint8]),
)
def test_new_tokens_arrive_at_their_places_and_nowhere_else(chunks, heads, seed, dtype):
    """However a row's tokens are cut into passes, and wherever its pages lie."""
    count, width = sum(chunks), 3
    needed = pages_of(count)
    numbers = random.Random(seed).sample(range(needed + 3), needed)
    home = Home("gpu", tuple(numbers))
    pool = torch.zeros(2, needed + 3, heads, PAGE_TOKENS, width, dtype=dtype)
    kv = torch.arange(count * 2 * heads * width).remainder(250).add(1)
    kv = kv.view(count, 2, heads, width).to(dtype)
    position = 0
    for chunk in chunks:
        row = Row(0, position, chunk, 0, True, True)
        placed = [(piece, home, piece.offset) for piece in cut_at_pages(row)]
        append_tokens(pool, NewTokens(placed, pool), kv[position : position + chunk])
        position += chunk
    laid = pool[:, numbers].transpose(1, 2).flatten(2, 3)
    assert torch.equal(laid[:, :, :count], kv.permute(1, 2, 0, 3))
    assert not laid[:, :, count:].any()
    others = [page for page in range(needed + 3) if page not in numbers]
    assert not pool[:, others].any()


@settings(max_examples=60)
@given(
    window=st.integers(1, 60),
    chunks=st.lists(st.one_of(st.just(1), st.integers(1, 90)), min_size=1, max_size=40),
    seed=st.integers(0, 99),
)
def test_pages_taken_in_turn_keep_the_window_of_the_next_token(window, chunks, seed):
    """Chunks of prompts and single tokens; no page is written that a token still attends."""
    kind, count = LayerKind(0, window), sum(chunks)
    numbers = random.Random(seed).sample(range(20), min(kind.most_pages, pages_of(count)))
    home = Home("gpu", tuple(numbers), most=kind.most_pages)
    pool = torch.zeros(2, 20, 1, PAGE_TOKENS, 1)
    kv = torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(-1, 2, 1, 1)
    position = 0
    for chunk in chunks:
        row = Row(0, position, chunk, 0, True, True)
        placed = [(piece, home, piece.offset) for piece in cut_at_pages(row, kind)]
        append_tokens(pool, NewTokens(placed, pool), kv[position : position + chunk])
        position += chunk
        seen = torch.arange(max(0, position - window), position)
        table = torch.from_numpy(home.table(pages_of(position))).long()
        assert torch.equal(
            pool[0, table[seen // PAGE_TOKENS], 0, seen % PAGE_TOKENS, 0], seen + 1.0
        )
        used = range(kind.first_page(position - 1), pages_of(position))
        assert len({home.page(index) for index in used}) == len(used)


@given(st.integers(1, 200), st.integers(0, 60), st.integers(1, 60))
def test_pieces_of_a_row_meet_the_bounds_of_pages(offset, position, count):
    row = Row(0, position, count, offset, True, True)
    pieces = cut_at_pages(row)
    assert [x for it in pieces for x in range(it.position, it.position + it.count)] == list(
        range(position, position + count)
    )
    assert all(it.offset - offset == it.position - position for it in pieces)
    whole = [it for it in pieces if it.count % PAGE_TOKENS == 0]
    assert all(it.position % PAGE_TOKENS == 0 for it in whole)
    assert all(it.position // PAGE_TOKENS == (it.position + it.count - 1) // PAGE_TOKENS
               for it in pieces if it not in whole)  # fmt: skip


def passes_of(scheduler: Scheduler, batches: int) -> int:
    """Passes of a run in which no answer ends before max_tokens."""
    passes = 0
    while not scheduler.is_done:
        for batch in range(batches):
            sampled = [row.slot for row in scheduler.compose(batch).sampled]
            scheduler.accept(batch, sampled, [3] * len(sampled))
        passes += 1
    return passes


def test_rows_that_entered_together_delay_none_that_enter_one_by_one():
    """Answers that may end enter together, until some are whole and none has ended early."""
    lengths, batches = (32, 256), 2
    mean = admission.mean_cached([lengths], are_apart=True)
    plan = plan_of(Policy(14, batches, 512, cache=Placement(0, 1, 0)), 1, sum(lengths), mean)
    scheduler, passes = scheduler_of([plan], frozenset({7})), []
    for ends_at_most in (True, False, True):
        params = SamplingParams(lengths[1], 0.0, ignore_eos=ends_at_most)
        scheduler.clear()
        scheduler.add(Request(index, [5] * lengths[0], params) for index in range(128))
        passes.append(passes_of(scheduler, batches))
    assert passes[0] == passes[2]
    # Until its first answers are whole, the second run has no more rows than fit together.
    assert passes[1] <= passes[0] + lengths[1]


@pytest.mark.parametrize("batches, rows, blocks_of_slots", [(2, 16, 8), (3, 24, 8), (4, 4, 12)])
def test_equal_rows_enter_one_by_one_where_that_is_faster(batches, rows, blocks_of_slots):
    """A cache of slots has `rows` in each batch; pages of as much memory have more."""
    prompt_len, answer, slots = 32, 512, batches * rows
    mean = admission.mean_cached([(prompt_len, answer)], are_apart=True)
    size = int(rows * (prompt_len + answer) / mean)
    policy = Policy(size, batches, 512, cache=Placement(0, 1, 0))
    plan = plan_of(policy, 1, prompt_len + answer, mean)
    count = blocks_of_slots * slots
    params = SamplingParams(answer, 0.0, ignore_eos=True)
    requests = [Request(index, [5] * prompt_len, params) for index in range(count)]
    scheduler = scheduler_of([plan])
    scheduler.add(requests)
    passes = passes_of(scheduler, batches)
    # As long as the cache of slots, less what half grown rows save, and once the time of an answer.
    bound = answer * (count / (size * batches) + 1)
    assert passes <= 1.04 * bound and not scheduler.recomputed_tokens
    assert passes < 0.72 * answer * blocks_of_slots
    # Few requests enter together, as fast as their slots allow.
    scheduler.add(requests[:slots])
    together = min(slots, plan.space.pages[1] // pages_of(prompt_len + answer))
    assert sum(len(scheduler.compose(batch).entered) for batch in range(batches)) == together


@pytest.mark.parametrize("least", [1, 2])
def test_few_rows_that_are_left_gather_in_few_batches(least):
    """In each of four batches with four rows, all rows but one end soon."""
    plan = plan_of(Policy(4, 4), 1, 100, 100)
    scheduler, homes = scheduler_of([plan], frozenset({7})), Homes(plan)
    scheduler.least_batches = least
    params = SamplingParams(67, 0.0)
    scheduler.add(Request(index, [5] * 33, params) for index in range(16))
    batches, tokens, long = [], Counter(), set()
    while not scheduler.is_done:
        with_rows = 0
        for batch in range(plan.num_batches):
            rows = scheduler.compose(batch)
            homes.apply(batch, rows)
            slots = [row.slot for row in rows.sampled]
            indices = scheduler.request_indices(batch, slots)
            long |= {index for index in indices[:1] if not batches}
            ends = [index not in long and tokens[index] == 13 for index in indices]
            tokens.update(indices)
            scheduler.accept(batch, slots, [7 if end else 3 for end in ends])
            with_rows += bool(slots)
        batches.append(with_rows)
    assert batches[0] == 4 and batches[40] == least
    assert tokens == Counter({index: 67 if index in long else 14 for index in range(16)})
    # A row that moves misses no more than a pass for each batch.
    assert len(batches) <= 67 + 4
