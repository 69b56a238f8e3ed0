"""Plans: linear coefficients that real sizes and costs confirm, optima that nothing beats."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import with_sparsity

from benchmarks import paper_machines as t4
from flexgen_ray.config import RATE_NAMES, TIERS, Budget, HardwareSpec, Placement, Policy
from flexgen_ray.cost.bound import PHASES, decoding_rows, visit_seconds
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes, tier_totals
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.comparison import HardwareNode, devices_of
from flexgen_ray.planner.corners import (
    ON_DEVICE,
    SHARES,
    Corners,
    Share,
    policy_of,
    shares_of,
)
from flexgen_ray.planner.grid import BATCHES, Grid, SearchSpace
from flexgen_ray.planner.lp import round_layers
from flexgen_ray.planner.pipeline_plan import ISSUING, ONE_BATCH, SCHEDULE, PlannedJob, StageDevice
from flexgen_ray.planner.search import Infeasible, Planner, find_best_plan

GIB = 2**30
OPT = shape_config("opt-1.3b")
LLAMA = replace(shape_config("llama-3-70b"), sliding_window=100)
# Two layers of three have windows; more would take as many pages as full attention.
MIXED = replace(LLAMA, num_layers=48, sliding_window=40, full_attention_layers=(*range(3, 49, 3),))
JOB = PlannedJob.uniform(1000, 128, 32)
SHARING = PlannedJob.uniform(1000, 512, 32, shared=320, groups=60)
FEW_SHAPES = SearchSpace(batch_sizes=(1, 4, 16), batches=(2, 4), tiles=(512,), extra_blocks=(0,))
# A machine that a model of 1.3B parameters doesn't fit.
SMALL = Budget(GIB, 2 * GIB, 64 * GIB)
RATES = replace(t4.MACHINE, device_flops_per_s=2e12, device_decode_flops_per_s=2e12)
FREE_TO_ISSUE = replace(RATES, launch_seconds=0.0, issue_seconds=0.0)


def device(budget: Budget = SMALL, rates: HardwareSpec = RATES, node: str = "") -> StageDevice:
    return StageDevice(lambda decode_rows, prefill_rows: rates, budget, node)


@st.composite
def placements(draw) -> Placement:
    """On whole eighths, so that rounding to tensors and rows stays small."""
    cuts = sorted(draw(st.tuples(st.integers(0, 8), st.integers(0, 8))))
    return Placement(cuts[0] / 8, (cuts[1] - cuts[0]) / 8, (8 - cuts[1]) / 8)


policies = st.builds(
    Policy,
    gpu_batch_size=st.sampled_from([8, 16, 32]),
    num_gpu_batches=st.integers(2, 4),
    max_batch_tokens=st.just(512),
    weights=placements(),
    cache=placements(),
    activations=placements(),
    cpu_attention=st.sampled_from([0.0, 0.5, 1.0]),
    weight_bits=st.sampled_from([None, 4, 8]),
    cache_bits=st.sampled_from([None, 4, 8]),
    # Tables lie somewhere as a whole: beside packed layers plain ones would be too large a piece.
).map(lambda it: replace(it, embedding_bits=it.weight_bits))
policies = st.builds(with_sparsity, policies, st.sampled_from([1.0, 0.1]))


def placed_weights(stage: StagePlan) -> Placement:
    """Fractions of the bytes of decoder layers and head on each tier, as whole matrices lie."""
    layers = (stage.weights.places[layer] for layer in range(1, stage.config.head_layer + 1))
    nbytes = dict.fromkeys(TIERS, 0)
    for place in (place for places in layers for place in places.values()):
        nbytes[place.tier] += place.nbytes
    return Placement(*(nbytes[tier] / sum(nbytes.values()) for tier in TIERS))


@pytest.mark.parametrize(
    ("config", "job", "prefix_tier"),
    [(OPT, JOB, "gpu"), (LLAMA, JOB, "gpu"), (MIXED, JOB, "gpu"),
     (OPT, SHARING, "gpu"), (MIXED, SHARING, "cpu")],
    ids=["opt", "windows", "mixed", "prefixes", "prefixes on the host"],
)  # fmt: skip
@settings(max_examples=8)
@given(policy=policies)
def test_corners_foretell_the_bytes_and_seconds_of_any_placement(config, job, prefix_tier, policy):
    planner = Planner(config, (device(),), job, "float16", prefix_tier=prefix_tier)
    plan = planner.evaluate((config.num_layers,), [policy])
    (stage,) = plan.stages
    free = Corners(stage, FREE_TO_ISSUE, job.middle_position)
    count, shares = config.num_layers, shares_of(policy, config.num_layers)
    need = tier_totals(stage_bytes(stage))
    # A table lies somewhere as a whole, and slots for it are there or aren't.
    table = config.vocab_size * config.hidden_size * 2
    slack = 3 * max(stage_bytes(stage)["gpu"]["weights in flight"], table)
    for tier in TIERS:
        told = free.value(("bytes", tier), count, shares, count)
        assert told == pytest.approx(getattr(need, tier), rel=0.05, abs=slack)
    # Seconds by where matrices came to lie, because only whole ones do.
    shares = shares_of(replace(policy, weights=placed_weights(stage)), count)
    rows = decoding_rows(stage, job.middle_position)
    exact = visit_seconds(stage, FREE_TO_ISSUE, rows)
    longest = max(exact.values())
    for name, seconds in exact.items():
        told = free.value(("decode", name), count, shares, count)
        assert told == pytest.approx(seconds, rel=0.03, abs=0.02 * longest)
    # Issuing an op takes as long with few rows, so a division has more of it than its parts.
    issued = Corners(stage, RATES, job.middle_position).value(
        ("decode", ISSUING), count, shares, count
    )
    assert 0 < issued <= visit_seconds(stage, RATES, rows)[ISSUING] * 1.03 + 0.02 * longest


@given(policy=policies, layers=st.integers(1, 96))
def test_shares_and_policies_say_the_same(policy, layers):
    again = policy_of(policy, layers, shares_of(policy, layers))
    for what in ("weights", "cache", "activations"):
        assert getattr(again, what).fractions == pytest.approx(
            getattr(policy, what).fractions, abs=2e-4
        )
    if policy.cache.cpu:
        assert again.cpu_attention == pytest.approx(policy.cpu_attention, abs=2e-3)


@settings(max_examples=15)
@given(policy=policies)
def test_no_placement_that_fits_is_faster_than_the_programs(policy):
    """Of the same shape, by the same cost model."""
    planner = Planner(OPT, (device(),), JOB, "float16")
    anywhere = Placement(1, 0, 0)
    shape = replace(policy, weights=anywhere, cache=anywhere, activations=anywhere)
    plan = planner.evaluate((OPT.num_layers,), [policy])
    need = tier_totals(stage_bytes(plan.stages[0]))
    if any(getattr(need, tier) > getattr(SMALL, tier) for tier in TIERS):
        return
    best = planner.plan(shape)
    assert best is not None
    assert best.block_seconds <= plan.block_seconds * 1.03


@settings(max_examples=10)
@given(
    tier=st.sampled_from(TIERS),
    rate=st.sampled_from(RATE_NAMES),
    factor=st.floats(1.1, 4),
)
def test_more_of_anything_never_makes_the_optimum_slower(tier, rate, factor):
    """Of one shape: memory, a rate, or both."""
    shape = Policy(16, 4, 512)
    more = replace(SMALL, **{tier: int(getattr(SMALL, tier) * factor)})
    faster = replace(RATES, **{rate: getattr(RATES, rate) * factor})

    def seconds(budget: Budget, rates: HardwareSpec) -> float:
        planner = Planner(OPT, (device(budget, rates),), JOB, "float16")
        return planner.estimate(shape).seconds_per_sequence

    base = seconds(SMALL, RATES)
    # The optimum is told to spare other lanes too, at a hundredth of their weight.
    assert seconds(more, RATES) <= base * 1.05
    assert seconds(SMALL, faster) <= base * 1.05
    assert seconds(more, faster) <= base * 1.05


@settings(max_examples=8)
@given(
    gpu=st.floats(0.3, 8), cpu=st.floats(0.2, 8), requests=st.integers(1, 200),
    prompt_len=st.integers(1, 700), bits=st.sampled_from([None, 4]),
)  # fmt: skip
def test_no_plan_exceeds_its_budget(gpu, cpu, requests, prompt_len, bits):
    budget = Budget(int(gpu * GIB), int(cpu * GIB), 64 * GIB)
    job = PlannedJob.uniform(requests, prompt_len, 16)
    try:
        search = replace(FEW_SHAPES, base=Policy(weight_bits=bits, cache_bits=bits))
        plan = find_best_plan(Planner(OPT, (device(budget),), job, "float16", search))
        assert plan.stages[0].policy.weight_bits == bits
    except Infeasible as error:
        assert "budget" in str(error)
        return
    need = tier_totals(stage_bytes(plan.stages[0]))
    assert all(getattr(need, tier) <= getattr(budget, tier) for tier in TIERS)


def test_what_fits_nowhere_is_refused_with_the_budget_that_lacks():
    budget = Budget(16 * 2**20, 2 * GIB, 64 * GIB)
    with pytest.raises(
        Infeasible, match=r"GPU of stage 0 lacks .*MiB beyond its budget of 16.0 MiB"
    ):
        find_best_plan(Planner(OPT, (device(budget),), JOB, "float16"))
    nowhere = Budget(GIB, GIB // 4, 0)
    with pytest.raises(Infeasible, match="lacks"):
        find_best_plan(Planner(OPT, (device(nowhere),), JOB, "float16"))
    with pytest.raises(Infeasible, match="25 stages are more than the model's 24 layers"):
        Planner(OPT, (device(),) * 25, JOB, "float16")


def test_without_the_solver_a_plan_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(RuntimeError, match="pip install highspy, or give a policy"):
        find_best_plan(Planner(OPT, (device(),), JOB, "float16"))


def test_a_block_answers_within_the_latency_that_is_asked_for():
    free = find_best_plan(Planner(OPT, (device(),), JOB, "float16", FEW_SHAPES))
    candidates = Planner(OPT, (device(),), JOB, "float16", FEW_SHAPES).all_candidates()
    limit = 1.2 * min(it.block_seconds for it in candidates)
    assert free.block_seconds > limit
    search = replace(FEW_SHAPES, max_seconds=limit)
    quick = find_best_plan(Planner(OPT, (device(),), JOB, "float16", search))
    assert quick.block_seconds <= limit * 1.01
    assert quick.tokens_per_s <= free.tokens_per_s
    with pytest.raises(Infeasible, match="no placement answers a block within 1e-05 s"):
        find_best_plan(
            Planner(OPT, (device(),), JOB, "float16", replace(FEW_SHAPES, max_seconds=1e-5))
        )


TINY = replace(OPT, num_layers=4)
TRIED = SearchSpace(batch_sizes=(2, 8, 32), batches=(1, 2, 4), tiles=(512,))
WEIGHTS = (Placement(1, 0, 0), Placement(0.5, 0.5, 0), Placement(0, 1, 0))
CACHES = ((Placement(1, 0, 0), 1.0), (Placement(0, 1, 0), 1.0), (Placement(0, 1, 0), 0.0))


@settings(max_examples=4)
@given(
    gpu=st.floats(0.5, 3), h2d=st.floats(1e9, 30e9), flops=st.floats(5e11, 1e14),
    attention=st.floats(1e9, 40e9), max_tokens=st.sampled_from([4, 64]),
)  # fmt: skip
def test_no_policy_of_a_grid_is_played_faster_than_the_choice(
    gpu, h2d, flops, attention, max_tokens
):
    """Within 5 %; blocks of one batch, in which nothing overlaps but weights, included."""
    rates = replace(
        RATES,
        h2d_bytes_per_s=h2d,
        host_attention_bytes_per_s=attention,
        device_flops_per_s=flops,
        device_decode_flops_per_s=flops / 2,
    )
    budget = Budget(int(gpu * GIB), 4 * GIB, 0)
    planner = Planner(
        TINY, (device(budget, rates),), PlannedJob.uniform(1000, 128, max_tokens), "float16", TRIED
    )
    chosen = find_best_plan(planner)
    shapes = product(TRIED.batch_sizes, TRIED.batches, WEIGHTS, CACHES)
    for size, batches, weights, (cache, attended) in shapes:
        policy = Policy(size, batches, 512, weights, cache, Placement(1, 0, 0), attended)
        plan = planner.evaluate((TINY.num_layers,), [policy])
        need = tier_totals(stage_bytes(plan.stages[0]))
        fits = all(getattr(need, tier) <= getattr(budget, tier) for tier in TIERS)
        # No plan is played faster than its lanes are.
        if fits and plan.tokens_per_s > chosen.tokens_per_s:
            assert chosen.tokens_per_s >= 0.95 * planner.simulate(plan).tokens_per_s


def test_a_row_longer_than_the_gpu_s_memory_leaves_the_gpu_to_the_weights():
    """Llama-3-8B on an RTX 4090, for answers of 512 tokens that may fill the context."""
    config = shape_config("llama-3-8b")
    devices = devices_of([HardwareNode(Hardware.preset("rtx4090"))], config, "float16")
    job = replace(PlannedJob.uniform(1000, 100, 512), max_tokens=config.max_seq_len - 100)
    planner = Planner(config, devices, job, "float16")
    beside = planner.within(tuple(share for share in SHARES if share != Share("cache", "gpu")))
    plain = beside.simulate(beside.plan(Policy(48, 2, 512)), 500)
    assert find_best_plan(planner).tokens_per_s >= 0.8 * plain.tokens_per_s


def test_a_model_that_fits_the_gpu_is_planned_in_one_batch_if_that_is_faster():
    """Llama-3-8B on an RTX 4090: with lanes that overlap everywhere two batches would look best."""
    config, node = shape_config("llama-3-8b"), HardwareNode(Hardware.preset("rtx4090"))
    (gpu,) = devices_of([node], config, "float16")
    free = replace(
        gpu, rates=lambda *rows: replace(gpu.rates(*rows), launch_seconds=0, issue_seconds=0)
    )
    for own, least in ((free, 2200), (gpu, 1000)):
        planner = Planner(config, (own,), PlannedJob.uniform(1000, 256, 128), "float16")
        resident = replace(planner, search=SearchSpace(batches=(1,), shares=ON_DEVICE))
        chosen, alone = find_best_plan(planner), find_best_plan(resident)
        assert alone.stages[0].policy.num_gpu_batches == 1
        assert alone.tokens_per_s > least
        assert chosen.tokens_per_s >= 0.99 * alone.tokens_per_s


def test_a_model_that_python_can_hardly_feed_is_planned_for_what_it_can():
    """OPT-6.7B on a GPU of 16 GiB, and a slow CPU: whatever is chosen as if issuing were free is no
    faster."""
    config, node = shape_config("opt-6.7b"), HardwareNode(Hardware.preset("h100"))
    (fast,) = devices_of([node.with_memory("14.4GiB", None, None)], config, "float16")
    slow = {"launch_seconds": 40e-6, "issue_seconds": 40e-6}
    gpu = replace(fast, rates=lambda *rows: replace(fast.rates(*rows), **slow))
    planner = Planner(config, (gpu,), PlannedJob.uniform(1000, 512, 32), "float16")
    chosen, spec = find_best_plan(planner), gpu.rates(8, 512)
    free = replace(
        gpu, rates=lambda *rows: replace(gpu.rates(*rows), launch_seconds=0, issue_seconds=0)
    )
    believed = find_best_plan(replace(planner, devices=(free,)))
    assert spec.launch_seconds > 0 and spec.issue_seconds > 0
    for plan in (chosen, believed):
        policy = plan.stages[0].policy
        (seconds,) = planner.simulate(planner.evaluate((config.num_layers,), [policy])).seconds
        assert seconds["decode"][SCHEDULE] >= seconds["decode"][ISSUING] * 0.999
        true = replace(plan, seconds=[seconds]).tokens_per_s
        assert true <= chosen.tokens_per_s * 1.01
    assert chosen.bottleneck[1] == ISSUING
    assert believed.tokens_per_s > 1.2 * chosen.tokens_per_s


@settings(max_examples=10)
@given(policy=policies, batches=st.integers(1, 3), is_prefill=st.booleans())
def test_no_schedule_is_quicker_than_one_batchs_way(policy, batches, is_prefill):
    policy = replace(policy, num_gpu_batches=batches)
    planner = Planner(TINY, (device(),), JOB, "float16")
    plan = planner.evaluate((TINY.num_layers,), [policy])
    phase = PHASES[not is_prefill]
    (seconds,) = plan.seconds
    played = planner.simulate(plan).seconds[0][phase][SCHEDULE]
    assert played >= 0.97 * seconds[phase][ONE_BATCH]


@pytest.mark.slow
def test_the_coarse_grid_misses_little_of_the_whole_one():
    planner = Planner(OPT, (device(),), JOB, "float16")
    quick, whole_grid = planner.promising_candidates()[0], planner.all_candidates()[0]
    assert quick.seconds_per_sequence <= 1.05 * whole_grid.seconds_per_sequence


@given(st.lists(st.floats(0.01, 30), min_size=1, max_size=8), st.integers(0, 20))
def test_whole_layers_sum_to_all_of_them(layers, more):
    total = len(layers) + more
    scale = total / sum(layers)
    counts = round_layers([it * scale for it in layers], total)
    assert sum(counts) == total and min(counts) >= 1


def test_layers_go_where_they_are_fast():
    """Within 5 % of the best split of two unequal machines, all splits tried."""
    fast = replace(RATES, h2d_bytes_per_s=2 * RATES.h2d_bytes_per_s, device_flops_per_s=8e12)
    devices = device(node="a"), device(Budget(3 * GIB, 4 * GIB, 64 * GIB), fast, "b")
    search = SearchSpace(batch_sizes=(16,), batches=(4,), tiles=(512,), extra_blocks=(0,))
    chosen = find_best_plan(Planner(OPT, devices, JOB, "float16", search))

    def rate(first: int) -> float:
        layers = (first, OPT.num_layers - first)
        plan = Planner(OPT, devices, JOB, "float16", replace(search, layers=layers)).plan(
            Policy(16, 4, 512, blocks_in_flight=2)
        )
        return plan.tokens_per_s if plan else 0.0

    rates = {first: rate(first) for first in range(1, OPT.num_layers)}
    assert chosen.tokens_per_s >= 0.95 * max(rates.values())
    assert chosen.tokens_per_s > 1.05 * rates[OPT.num_layers // 2]


def test_stages_of_one_node_share_its_memory_and_bandwidth():
    together = tuple(device(node="one") for _ in range(2))
    apart = tuple(device(node=name) for name in "ab")
    search = SearchSpace(batch_sizes=(16,), batches=(4,), extra_blocks=(0,))
    near, far = (
        find_best_plan(Planner(OPT, it, JOB, "float16", search)) for it in (together, apart)
    )
    needs = [tier_totals(stage_bytes(stage)) for stage in near.stages]
    assert sum(need.cpu for need in needs) <= SMALL.cpu
    assert near.tokens_per_s <= far.tokens_per_s
    assert "the node's host_memory" in near.seconds[0]["decode"]


def test_without_overlap_lanes_add_up():
    shape = Policy(16, 4, 512)
    plans = [
        Planner(OPT, (device(),), JOB, "float16", SearchSpace(overlaps=it)).plan(shape)
        for it in (True, False)
    ]
    assert all(plans)
    overlapped, serial = plans
    for phase in PHASES:
        assert serial.visit_seconds(phase) > overlapped.visit_seconds(phase)
    assert serial.bottleneck[1] == "all lanes"


def test_sixteen_batches_are_chosen_where_they_are_better():
    """OPT-175B on one of the paper's machines, which holds that many sequences."""
    config, job = shape_config("opt-175b"), PlannedJob.uniform(10_000, 128, 128)
    few, more = (
        find_best_plan(
            Planner(config, t4.machines(1), job, "float16", SearchSpace(Policy(), sizes, batches))
        )
        for sizes, batches in (((32, 48, 64), (4, 6, 8)), ((32, 48, 64), BATCHES))
    )
    assert more.stages[0].policy.num_gpu_batches == 16 == max(BATCHES)
    assert more.tokens_per_s > few.tokens_per_s


def test_batch_sizes_that_the_grid_lacks_are_tried_at_last():
    """Memory that doesn't take the grid's next batch size takes some of the rows up to it."""
    shape = Policy(gpu_batch_size=64, num_gpu_batches=2, blocks_in_flight=1)
    sizes = [each.gpu_batch_size for each in Grid(SearchSpace(), JOB, 1).between(shape)]
    few = replace(JOB, num_requests=150)
    assert sizes == [52, 56, 60, 72, 80, 88]
    sizes = [each.gpu_batch_size for each in Grid(SearchSpace(), few, 1).between(shape)]
    assert sizes == [52, 56, 60, 72]
    small = replace(shape, gpu_batch_size=1)
    assert not [*Grid(SearchSpace(batch_sizes=(1, 2)), JOB, 1).between(small)]
