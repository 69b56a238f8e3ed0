"""Fractions are honoured, sizes are what the stores take, and budgets are checked beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import REAL, opt, placements, policies, with_sparsity

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.config import TIERS, Budget, Workload
from flexgen_ray.kernels.paged_splits import workspace_bytes
from flexgen_ray.layout.placement import (
    place_weights,
    split_rows,
    split_tokens,
    tensor_bytes,
)
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import (
    check_budget,
    split_bytes,
    stage_bytes,
    tier_totals,
    weight_bytes,
)
from flexgen_ray.planner.budgets import (
    CUDA_RESERVE,
    GPU_SHARE,
    settle_budget,
    settle_budgets,
    settle_dtype,
)
from flexgen_ray.planner.fill import fill_tiers
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.units import format_bytes, parse_bytes

BITS = st.sampled_from([None, 4, 8])
compressed = st.builds(
    replace,
    st.builds(with_sparsity, policies, st.sampled_from([0.1, 1.0])),
    weight_bits=BITS,
    embedding_bits=BITS,
    cache_bits=BITS,
)


def test_parameter_counts_are_those_of_the_real_models():
    counts = {}
    for name, config in REAL.items():
        stage = StageLayers.whole(config.num_layers)
        policy, workload = Policy(), Workload(1, 1, 2)
        plan = StagePlan(config, stage, policy, workload, "float16")
        counts[name] = weight_bytes(plan)["gpu"] / 2e9
    assert counts["smollm2-135m"] == pytest.approx(0.1345, rel=0.01)
    assert counts["llama-3-8b"] == pytest.approx(8.03, rel=0.01)
    assert counts["opt-6.7b"] == pytest.approx(6.66, rel=0.01)
    assert counts["opt-30b"] == pytest.approx(29.97, rel=0.01)
    assert counts["opt-175b"] == pytest.approx(174.6, rel=0.01)


@pytest.mark.parametrize("name", REAL)
@settings(max_examples=20)
@given(placement=placements(), bits=st.sampled_from([None, 4, 8]))
def test_weight_fractions_hold_within_one_percent_or_one_tensor(name, placement, bits):
    config = REAL[name]
    stage = StageLayers.whole(config.num_layers)
    kept = WeightFormat("float16", bits)
    tiers = place_weights(config, stage, placement, kept)
    given_bytes, largest = dict.fromkeys(TIERS, 0), 0
    for cuts in tiers.values():
        sizes = {cut: tensor_bytes(cut.name, cut.shape, kept) for cut in cuts}
        largest = max(largest, *(sizes[cut] for cut in cuts if cut.first is None))
        for cut, tier in cuts.items():
            given_bytes[tier] += sizes[cut]
    total = sum(given_bytes.values())
    slack = max(0.01, largest / total if largest / total > 0.05 else 0)
    for tier, fraction in zip(TIERS, placement.fractions, strict=True):
        assert abs(given_bytes[tier] / total - fraction) <= slack
        assert fraction > 0 or given_bytes[tier] == 0


@given(policies, st.integers(1, 60))
@settings(max_examples=25)
def test_cache_fractions_hold_over_all_blocks(policy, num_blocks):
    splits = split_rows(policy, num_blocks)
    assert len(splits) == num_blocks * policy.num_gpu_batches
    rows = [sum(split.tiers[tier] for split in splits) for tier in range(3)]
    total = num_blocks * policy.block_size
    assert sum(rows) == total
    for count, fraction in zip(rows, policy.cache.fractions, strict=True):
        assert abs(count - fraction * total) <= max(1, 0.01 * total)
        assert fraction > 0 or count == 0
    attended = sum(split.attended for split in splits)
    assert abs(attended - policy.cpu_attention * rows[1]) <= max(1, 0.01 * total)
    assert policy.cpu_attention > 0 or attended == 0


@given(placements(), st.integers(0, 5000))
def test_hidden_fractions_hold(placement, num_tokens):
    counts = split_tokens(placement, num_tokens)
    assert sum(counts) == num_tokens and min(counts) >= 0
    for count, fraction in zip(counts, placement.fractions, strict=True):
        assert abs(count - fraction * num_tokens) <= 1
        assert fraction > 0 or count == 0


@given(policy=compressed, name=st.sampled_from(["opt-350m-like", "llama", "olmo2", "gemma3"]))
@settings(max_examples=30)
def test_the_stores_take_exactly_what_was_computed(tiny_models, policy, name):
    folder, references = tiny_models[name]
    with LLM(folder, policy=policy, dtype="float32", device="cpu", use_ray=False) as llm:
        llm.generate([references[0].prompt], SamplingParams(max_tokens=2, temperature=0))
        (stage,) = llm.report.stages
        assert stage.used == stage_bytes(stage.plan)


@given(policy=policies, tier=st.sampled_from(TIERS))
@settings(max_examples=20)
def test_a_budget_one_byte_short_is_refused_with_the_numbers(policy, tier):
    config = REAL["smollm2-135m"]
    stage = StageLayers.whole(config.num_layers)
    plan = StagePlan(config, stage, policy, Workload(8, 100, 120), "float32")
    need = tier_totals(stage_bytes(plan))
    check_budget(plan, need)
    amounts = {name: getattr(need, name) for name in TIERS}
    if amounts[tier] == 0:
        return
    short = Budget(**(amounts | {tier: amounts[tier] - 1}))
    with pytest.raises(ValueError) as error:
        check_budget(plan, short)
    assert f"on the {tier} tier" in str(error.value)
    assert format_bytes(amounts[tier]) in str(error.value)
    assert f"--{tier}-memory" in str(error.value)


def default_policy(config, stage, workload, dtype, budget) -> Policy:
    (plan,) = fill_tiers([StagePlan(config, stage, Policy(), workload, dtype)], [budget])
    return plan.policy


@given(
    st.integers(64, 4000), st.integers(64, 4000), st.integers(1, 300), st.integers(1, 2000),
    st.integers(1, 200),
)  # fmt: skip
@settings(max_examples=15)
def test_the_default_policy_fits_or_says_what_lacks(gpu, cpu, num_requests, prompt, answer):
    """Budgets in MiB; SmolLM2's 540 MB in float32 overflow most of them to disk."""
    config = REAL["smollm2-135m"]
    stage = StageLayers.whole(config.num_layers)
    budget = Budget(gpu * 2**20, cpu * 2**20, 40 * 2**30)
    workload = Workload(num_requests, prompt, prompt + answer)
    try:
        policy = default_policy(config, stage, workload, "float32", budget)
    except ValueError as error:
        assert "--gpu-memory" in str(error) or "--cpu-memory" in str(error)
        return
    check_budget(StagePlan(config, stage, policy, workload, "float32"), budget)


def test_the_default_policy_fills_the_fastest_tiers_first():
    config = REAL["opt-30b"]
    stage = StageLayers.whole(config.num_layers)
    workload = Workload(1000, 512, 544)

    def policy(gpu, cpu):
        budget = Budget(gpu * 2**30, cpu * 2**30, 1500 * 2**30)
        return default_policy(config, stage, workload, "float16", budget)

    assert policy(200, 0).weights == Placement(1, 0, 0)
    t4 = policy(16, 208)
    assert t4.weights.disk == 0 and 0.05 < t4.weights.gpu < 0.25
    assert t4.cache.disk == 0 and t4.block_size >= 64
    assert t4.num_gpu_batches >= 2 and t4.activations.disk == 0
    need = tier_totals(stage_bytes(StagePlan(config, stage, t4, workload, "float16")))
    assert need.gpu > 0.95 * 16 * 2**30
    small = policy(16, 32)
    assert small.weights.disk > 0.3 and small.weights.gpu > 0.05


def test_hidden_states_stay_off_the_disk_while_memory_is_free():
    config = REAL["smollm2-135m"]
    budget = Budget(400 * 2**20, 2 * 2**30, 40 * 2**30)
    stage, workload = StageLayers.whole(config.num_layers), Workload(64, 500, 600)
    policy = default_policy(config, stage, workload, "float32", budget)
    assert policy.activations.disk == policy.cache.disk == policy.weights.disk == 0


def machine(device: str = "cpu", is_fast_in_bfloat16: bool = True) -> Machine:
    gib = 2**30
    return Machine("host", device, "card", 16 * gib, 64 * gib, 500 * gib, 8, is_fast_in_bfloat16)


def test_the_object_store_of_a_ray_of_our_own_counts_against_host_memory():
    limits = {"gpu": 2**30, "cpu": 2**30, "disk": None}
    reserved = 80 * 2**20
    assert settle_budget(machine(), limits, reserved).cpu == 2**30 - reserved
    with pytest.raises(ValueError, match="object store"):
        settle_budget(machine(), limits | {"cpu": 2**20}, reserved)


def test_stages_on_one_gpu_divide_its_memory():
    limits = dict.fromkeys(("gpu", "cpu", "disk"))
    a, b = (replace(machine("cuda"), gpu_id=it) for it in "ab")
    own, shared = settle_budgets([a, b], limits, 0), settle_budgets([a, a], limits, 0)
    assert [it.gpu for it in own] == [int(16 * 2**30 * GPU_SHARE) - CUDA_RESERVE] * 2
    assert [it.gpu for it in shared] == [int(8 * 2**30 * GPU_SHARE) - CUDA_RESERVE] * 2
    assert [it.cpu for it in own] == [it.cpu for it in shared]


def test_dtype_follows_the_checkpoint_where_the_machine_is_fast_in_it():
    assert settle_dtype("auto", "float16", [machine("cpu")]) == ("float32", None)
    assert settle_dtype("auto", "bfloat16", [machine("cpu")]) == ("bfloat16", None)
    assert settle_dtype("auto", "bfloat16", [machine("cpu", False)]) == ("float32", None)
    assert settle_dtype("auto", "bfloat16", [machine("cuda")]) == ("bfloat16", None)
    assert settle_dtype("auto", "float16", [machine("cuda", False)]) == ("float16", None)
    assert settle_dtype("float32", "bfloat16", [machine("cuda")]) == ("float32", None)
    dtype, note = settle_dtype("auto", "bfloat16", [machine("cuda"), machine("cuda", False)])
    assert dtype == "float16" and "65504" in note and "--dtype float32" in note


def test_a_family_that_overflows_float16_never_runs_in_it():
    for checkpoint in ("float16", "bfloat16"):
        with pytest.raises(ValueError, match="65504.*use --dtype bfloat16 or float32"):
            settle_dtype("float16", checkpoint, [machine("cuda")], True)
        assert settle_dtype("auto", checkpoint, [machine("cuda")], True) == ("bfloat16", None)
        dtype, note = settle_dtype("auto", checkpoint, [machine("cuda", False)], True)
        assert dtype == "float32" and "may exceed float16" in note


def test_gemma_3_is_refused_in_float16_before_anything_is_loaded(tiny_models):
    with pytest.raises(ValueError, match="use --dtype bfloat16 or float32"):
        LLM(tiny_models["gemma3"][0], dtype="float16", use_ray=False)


def test_sizes_read_and_write_as_people_do():
    assert parse_bytes("16GiB") == 16 * 2**30
    assert parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes("4096") == 4096
    assert format_bytes(16 * 2**30) == "16.0 GiB"
    for text in ("16 apples", "-1GiB", "", "GiB"):
        with pytest.raises(ValueError, match="16GiB"):
            parse_bytes(text)


@given(
    rows=st.integers(1, 2000),
    kv_heads=st.integers(1, 64),
    sharing=st.integers(1, 16),
    head_dim=st.sampled_from([16, 64, 128, 256]),
    most=st.integers(1, 200_000),
)
def test_partial_results_of_a_gpu_fit_what_is_counted(rows, kv_heads, sharing, head_dim, most):
    heads = kv_heads * sharing
    config = replace(opt(1, 64, 1), num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    needed = workspace_bytes(rows, heads, kv_heads, head_dim, most)
    assert needed <= split_bytes(config)
