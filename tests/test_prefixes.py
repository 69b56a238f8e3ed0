"""Prefixes that prompts share: found, computed once, kept while they are read; no token depends on
them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import opt, policies, with_sparsity

from flexgen_ray.config import PAGE_TOKENS, TIERS, Sharing, Workload
from flexgen_ray.layout import admission
from flexgen_ray.layout.admission import Admission
from flexgen_ray.layout.pages import pages_of
from flexgen_ray.layout.plan import FOLDED_ROWS, StagePlan
from flexgen_ray.layout.rows import PlacedRows, Rows, streamed_pages_of
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime import prefixes
from flexgen_ray.runtime.passes import Passes
from flexgen_ray.runtime.prefixes import MOST_LEVELS, find_prefixes, rank_groups
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.store.kv_cache import streamed_table

MODEL = opt(2, 32, 2)
MODELS = MODEL, replace(MODEL, sliding_window=20, full_attention_layers=(1,))


@st.composite
def prompts(draw, most_pages: int = 7) -> list[list[int]]:
    """Prompts of pages of one letter each, so that many begin alike, and of a part of a page."""
    texts = st.text("ab", max_size=most_pages)
    some = draw(st.lists(texts, min_size=1, max_size=5))
    texts = st.one_of(texts, st.sampled_from(some), st.sampled_from(some).map(lambda it: it[:-2]))
    pairs = st.tuples(texts, st.integers(1, PAGE_TOKENS))
    drawn = draw(st.lists(pairs, min_size=1, max_size=14))
    return [[5 + ord(page) % 2 for page in text for _ in range(PAGE_TOKENS)] + [9] * more
            for text, more in drawn]  # fmt: skip


def requests_of(some: list[list[int]], most: int = 1, first: int = 0) -> list[Request]:
    params = SamplingParams(most, 0.0, ignore_eos=True)
    return [Request(index, prompt, params) for index, prompt in enumerate(some, first)]


@st.composite
def jobs(draw) -> list[Request]:
    """Requests, of which some want scores of their prompts from a token on."""
    requests = []
    for request in requests_of(draw(prompts())):
        last = len(request.prompt_token_ids)
        scored = draw(st.integers(1, 4 * last))
        requests.append(replace(request, scored_from=scored) if scored <= last else request)
    return requests


@settings(max_examples=60)
@given(jobs(), st.one_of(st.none(), st.integers(1, 6)), st.integers(1, 4), st.data())
def test_prefixes_are_those_of_a_tree_of_all_pages(requests, most, least, data):
    """Found anew: page by page over all prefixes of all prompts, in a tree with a node for each."""

    def pages(request: Request) -> tuple[tuple[int, ...], ...]:
        count, ids = 0, request.prompt_token_ids
        scored = len(ids) if request.scored_from is None else request.scored_from
        while (count + 1) * PAGE_TOKENS < min(len(ids), scored) and count != most:
            count += 1
        return tuple(tuple(ids[x * PAGE_TOKENS :][:PAGE_TOKENS]) for x in range(count))

    tree: dict[tuple, list[Request]] = {}
    for request in requests:
        for count in range(len(pages(request)) + 1):
            tree.setdefault(pages(request)[:count], []).append(request)
    deepest: dict[int, tuple] = {}
    made: dict[tuple, tuple] = {}  # each prefix with its parent
    levels = {(): 0}
    for node in sorted((it for it in tree if it and len(tree[it]) > 1), key=len):
        users = tree[node]
        follow = Counter(pages(it)[: len(node) + 1] for it in users)
        ways = len(follow) + max(0, follow[node] - 1)
        parent = next(node[:x] for x in range(len(node) - 1, -1, -1) if node[:x] in levels)
        own = len(node) - len(parent)
        copies = sum(
            1 if after != node and (own + 1) * (count - 1) >= least else count
            for after, count in follow.items()
        )
        if ways > 1 and own * (copies - 1) >= least and levels[parent] < MOST_LEVELS:
            made[node], levels[node] = parent, levels[parent] + 1
            deepest |= dict.fromkeys((it.index for it in users), node)

    def ids(node: tuple) -> tuple[int, ...]:
        return tuple(token for page in node for token in page)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "_least_saved", lambda some: least)
        shared = find_prefixes(requests, most, first_number=3)
    assert shared.possible_tokens == PAGE_TOKENS * sum(
        len(users) - 1 for node, users in tree.items() if node
    )
    assert {index: it.token_ids for index, it in shared.of_request.items()} == {
        index: ids(node) for index, node in deepest.items()
    }
    assert [it.number for it in shared.prefixes] == list(range(3, 3 + len(made)))
    found = {it.token_ids: it for it in shared.prefixes}
    assert found.keys() == {ids(node) for node in made}
    for node, parent in made.items():
        prefix = found[ids(node)]
        assert prefix.parent is (found[ids(parent)] if parent else None)
        assert prefix.parent is None or prefix.parent.number < prefix.number
        assert (prefix.start, prefix.end) == (len(ids(parent)), len(ids(node)))
        assert prefix.users == len(tree[node]) and prefix.pages == prefix.tokens // PAGE_TOKENS
    assert_groups_stand_together(requests, shared)


@pytest.mark.parametrize(
    ("users", "pages", "answer", "are_shared"),
    [(2, 4, 1, True), (2, 3, 1, False), (9, 1, 16, True), (8, 1, 16, False),
     (5, 1, 48, False), (48, 1, 48, True), (48, 1, 512, False), (2, 64, 512, True),
     (2, 63, 512, False)],
)  # fmt: skip
def test_a_prefix_saves_enough_for_the_passes_of_its_users(users, pages, answer, are_shared):
    """A few tokens of a chat's template are not worth products in each of many passes."""
    some = [[7] * pages * PAGE_TOKENS + [8 + user] for user in range(users)]
    shared = find_prefixes(requests_of(some, answer))
    assert bool(shared.prefixes) is are_shared
    assert shared.possible_tokens == (users - 1) * pages * PAGE_TOKENS


def assert_groups_stand_together(requests, shared) -> None:
    """Requests of a prefix have one rank, those of prefixes within it the next ones."""
    ranks = rank_groups(requests, lambda it: shared.of_request.get(it.index))
    assert ranks.keys() == {it.index for it in requests}
    assert {*ranks.values()} == {
        *range(len({*shared.of_request.values()} | {shared.of_request.get(it) for it in ranks}))
    }
    for prefix in shared.prefixes:
        users = {index: it for index, it in shared.of_request.items() if prefix in it.chain}
        inside = {ranks[index] for index in users}
        assert max(inside) - min(inside) + 1 == len(inside)
        assert all(ranks[index] not in inside for index in ranks if index not in users)


class Cache:
    """Pages of a stage's rows and prefixes as its passes place them, and what must hold of them."""

    def __init__(self, plan: StagePlan, scheduler: Scheduler, number: int) -> None:
        self.plan = plan
        self.passes = Passes(plan, scheduler, torch.device("cpu"), number)
        self.passed: dict[tuple[int, int], int] = {}  # tokens of each slot's row, or prefix
        self.chains: dict[tuple[int, int], tuple[int, ...]] = {}
        self.kept: dict[int, int] = {}
        self.computed: Counter[int] = Counter()
        # By batch, prefixes that its last pass reads: until the next one is composed, it may.
        self.reads: dict[int, set[int]] = {}

    def apply(self, batch: int, rows: Rows) -> None:
        for slot, *there in rows.moved:
            for of_slot in (self.passed, self.chains):
                of_slot[batch, slot] = of_slot.pop(tuple(there))
        for slot, number, tokens in rows.completed:
            assert self.passed.pop((batch, slot)) == tokens > 0 == tokens % PAGE_TOKENS
            del self.chains[batch, slot]
            assert number not in self.kept
            self.kept[number] = tokens
            self.computed[number] += 1
        for slot in rows.left:
            del self.passed[batch, slot], self.chains[batch, slot]
        self.reads[batch] = set()
        for number in rows.dropped:
            assert not any(number in read for read in (*self.reads.values(), *self.chains.values()))
            del self.kept[number]
        for slot, _, _, chain in rows.entered:
            assert (batch, slot) not in self.passed and self.kept.keys() >= {*chain}
            self.passed[batch, slot], self.chains[batch, slot] = 0, chain
        self._assert_placed(batch, rows, self.passes._place(batch, rows))

    def _assert_placed(self, batch: int, rows: Rows, placed: list[PlacedRows]) -> None:
        plan, space = self.plan, self.plan.space
        for row in rows.rows:
            chain = self.chains[batch, row.slot]
            self.reads[batch] |= {*chain}
            assert row.before == sum(self.kept[number] for number in chain)
            assert row.position == self.passed[batch, row.slot]
            self.passed[batch, row.slot] += row.num_new_tokens
            for kind, of_kind in zip(plan.kinds, placed, strict=True):
                pages = len(of_kind.home(row).pages)
                assert kind.pages_of(row.seq_len) <= pages <= kind.most_pages
                ends = [it.end for it in of_kind.prefixes(row)]
                assert [it.number for it in of_kind.prefixes(row)] == [*chain]
                assert [it.start for it in of_kind.prefixes(row)] == [0, *ends][: len(ends)]
        for kind, of_kind in zip(plan.kinds, placed, strict=True):
            streamed = sum(streamed_pages_of(row, kind) for row in of_kind.streaming)
            assert streamed <= plan.slot_pages
            assert sum(count for *_, count in of_kind.prefix_copies) <= space.prefix_slot
            self._assert_owned_once(kind.number)
            self._assert_folded(of_kind)

    def _assert_owned_once(self, kind: int) -> None:
        pages = self.passes._pages
        held = [homes[kind] for homes in pages._homes.values()]
        held += [shared[kind].home for shared in pages._prefixes.values()]
        held += [home.copy for home in held if home.copy]
        owners = Counter((home.tier, page) for home in held for page in home.pages)
        assert max(owners.values(), default=1) == 1
        for tier, count in zip(TIERS, self.plan.space.all_pools[kind], strict=True):
            taken = [page for of, page in owners if of == tier]
            assert len(taken) == count - pages._pools[kind][tier].free
            assert all(page < count for page in taken)

    def _assert_folded(self, placed: PlacedRows) -> None:
        """Rows' tables name the pages of folded prefixes, and then their own; sparse rows' all."""
        users = Counter(
            shared.number
            for row in placed.rows.rows
            for shared in placed.prefixes(row)
            if not row.is_prefill
        )
        streamed = {row.slot for row in placed.streamed}
        for row in placed.rows.rows:
            if row.is_prefill:
                continue
            chain, own = placed.prefixes(row), placed.home(row)
            folded = [shared for shared in chain if shared.number in placed.folded]
            assert folded == [*chain[len(chain) - len(folded) :]]
            assert len(folded) == len(chain) if self.plan.is_sparse else all(
                users[shared.number] < FOLDED_ROWS for shared in folded
            )  # fmt: skip
            assert (row in placed.sharing) is (len(folded) < len(chain))
            tokens = row.seq_len + sum(shared.end - shared.start for shared in folded)
            assert placed.length(row) == tokens <= row.before + row.seq_len
            if row.slot in streamed:
                table = streamed_table(placed, row)
                copied = {
                    place + x for place, _, count, _ in placed.prefix_copies for x in range(count)
                }
                assert copied >= {*table[: pages_of(tokens - row.seq_len)]}
                continue
            pages = [
                page
                for shared in folded
                for page in shared.home.on(own.tier).table(pages_of(shared.end - shared.start))
            ]
            wanted = [*pages, *own.table(pages_of(row.seq_len))]
            assert placed.table(row, own).tolist() == wanted

    def assert_empty(self) -> None:
        assert not self.passed and not self.kept
        for pools, counts in zip(self.passes._pages._pools, self.plan.space.all_pools, strict=True):
            assert tuple(pools[tier].free for tier in TIERS) == counts


@st.composite
def stages(draw, some: list[list[int]]) -> list[StagePlan]:
    """Two stages of one shape, with few pages for prefixes or many."""
    longest, answer = max(map(len, some)), draw(st.integers(1, 40))
    quota = PAGE_TOKENS * draw(st.integers(1, 20))
    workload = Workload(
        len(some), longest, longest + answer, mean_seq_len=draw(st.integers(1, longest + answer)),
        sharing=Sharing(1, quota, quota, 0.0, 1.0),
    )  # fmt: skip
    shape, blocks, model = draw(policies), draw(st.integers(1, 2)), draw(st.sampled_from(MODELS))
    sparsity = draw(st.sampled_from([0.5, 1.0]))
    plans = []
    for other in (shape, draw(policies)):
        policy = replace(shape, cache=other.cache, cpu_attention=other.cpu_attention)
        policy = with_sparsity(policy, sparsity)
        layers = StageLayers.whole(2)
        plan = StagePlan(model, layers, policy, workload, "float32", num_blocks=blocks)
        if any(split.cpu for split in plan.splits):
            plan = replace(plan, prefix_tier=draw(st.sampled_from(["gpu", "cpu"])))
        plans.append(plan)
    return plans


class Run:
    """A run of a scheduler and its stages without tensors."""

    def __init__(self, plans: list[StagePlan], ends: int | None = None) -> None:
        policy = plans[0].policy
        self.scheduler = Scheduler(
            policy.gpu_batch_size, plans[0].num_batches, plans[0].cell_tokens,
            frozenset() if ends is None else frozenset({ends}),
            admission=Admission([plan.space for plan in plans]),
        )  # fmt: skip
        self.caches = [Cache(plan, self.scheduler, x) for x, plan in enumerate(plans)]
        self.passes: list[Rows] = []
        self.prompt_tokens = 0

    def pass_of(self, batch: int) -> list[int]:
        """Slots that are sampled in a batch's next pass."""
        rows = self.scheduler.compose(batch)
        for cache in self.caches:
            cache.apply(batch, rows)
        self.passes.append(rows)
        self.prompt_tokens += rows.prefill_tokens
        return [row.slot for row in rows.sampled]

    def to_the_end(self, choose, is_late: bool = False) -> None:
        """choose(request, tokens so far): the next token; is_late: of others when it is needed."""
        scheduler, late = self.scheduler, {}

        def accept(batch: int) -> None:
            slots = late.pop(batch, [])
            sequences = [scheduler._slots[batch][slot] for slot in slots]
            tokens = [choose(it.request.index, it.num_generated) for it in sequences]
            scheduler.accept(batch, slots, tokens)

        for _ in range(3000):
            if scheduler.is_done:
                break
            for batch in range(scheduler.num_batches):
                accept(batch)
                late[batch] = self.pass_of(batch)
                if not is_late:
                    accept(batch)
        assert scheduler.is_done
        # What the last rows had is given back when their batches are composed again.
        for batch in [*range(scheduler.num_batches)] * 2:
            assert not self.pass_of(batch)
        for cache in self.caches:
            cache.assert_empty()


@settings(max_examples=25)
@given(st.data(), prompts(4), st.integers(0, 99), st.booleans())
def test_every_request_ends_and_every_page_comes_back(data, some, seed, are_misjudged):
    """In two stages, whichever rows end early, and if admission lets too many in."""
    plans = data.draw(stages(some))
    most = plans[0].max_seq_len - plans[0].workload.max_prompt_len

    def choose(index: int, count: int) -> int:
        return 7 if random.Random(seed + 1000 * index + count).random() < 0.1 else 3

    def run(is_late: bool) -> Run:
        run = Run(plans, ends=7)
        run.scheduler.add(requests_of(some[::2], most))
        run.scheduler.add(requests_of(some[1::2], most, len(some)))
        run.to_the_end(choose, is_late)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "_least_saved", lambda some: 1)
        if are_misjudged:
            patch.setattr(admission, "peak_pages", lambda *_: 0)
        early, late = run(False), run(True)
    finished = {it.index: it for it in early.scheduler.take_finished()}
    indices = {*range(len(some[::2])), *(len(some) + x for x in range(len(some[1::2])))}
    assert finished.keys() == indices
    for index, it in finished.items():
        count = len(it.token_ids)
        assert it.token_ids == [choose(index, x) for x in range(count)]
        assert count == most or it.token_ids[-1] == 7
    # Decisions don't depend on when tokens of other batches arrive.
    assert early.passes == late.passes[: len(early.passes)]
    assert not any(rows.rows for rows in late.passes[len(early.passes) :])


@settings(max_examples=25)
@given(st.data(), prompts(5))
def test_prompt_tokens_are_computed_less_what_sharing_saves(data, some):
    """Where pages suffice, each prefix once, in chunks or whole."""
    plans = data.draw(stages(some))
    quota = Sharing(1, 16 * 999, 16 * 999, 0.0, 1.0)
    plans = [
        replace(it, workload=replace(it.workload, sharing=quota), pages_per_row=it.longest_pages)
        for it in plans
    ]
    run, least = Run(plans), data.draw(st.integers(1, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "_least_saved", lambda some: least)
        requests = requests_of(some)
        shared = find_prefixes(requests)
        run.scheduler.add(requests)
        run.to_the_end(lambda *_: 3)
    own = sum(len(it.prompt_token_ids) - shared.before(it) for it in requests)
    of_prefixes = sum(it.tokens for it in shared.prefixes)
    assert run.prompt_tokens == own + of_prefixes
    assert run.caches[0].computed == Counter({it.number: 1 for it in shared.prefixes})
    if least == 1 and all(len(it.chain) < 4 for it in shared.prefixes):
        assert run.prompt_tokens == sum(map(len, some)) - shared.possible_tokens
