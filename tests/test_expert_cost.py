"""Costs of a mixture's experts obey laws: of counting, of dense products, and of few rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray.config import Policy, Workload
from flexgen_ray.cost.experts import (
    expert_products,
    largest_group,
    multiplied_rows,
    rows_of_expert,
    touched_experts,
)
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Resource, seconds_alone, seconds_by_resource
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.pipeline_plan import ModelRates
from flexgen_ray.schedule.zigzag import StageLayers

GPUS = {name: Hardware.preset(name) for name in ("t4", "l4", "a5000", "rtx4090", "h200")}
QWEN, MIXTRAL = shape_config("qwen3-30b-a3b"), shape_config("mixtral-8x7b")
mixtures = st.builds(
    lambda experts, share: replace(
        QWEN, num_experts=experts, experts_per_token=max(1, round(share * experts))
    ),
    st.integers(1, 512),
    st.floats(0, 1),
)


def stage_plan(config, rows, stages_disk=True):
    policy, workload = Policy(rows, max_batch_tokens=8192), Workload(rows, 1, 2)
    stage = StageLayers.whole(config.num_layers)
    return StagePlan(config, stage, policy, workload, "float16", stages_disk)


@given(config=mixtures, tokens=st.integers(1, 6000), more=st.integers(1, 100))
def test_more_tokens_touch_more_experts_and_no_group_outgrows_its_tokens(config, tokens, more):
    chosen, experts = config.experts_per_token, config.num_experts
    touched = touched_experts(config, tokens)
    assert chosen * (1 - 1e-9) <= touched <= min(experts, tokens * chosen) * (1 + 1e-9)
    assert touched <= touched_experts(config, tokens + more) * (1 + 1e-9)
    mean, largest = tokens * chosen / experts, largest_group(config, tokens)
    assert mean <= largest * (1 + 1e-9) and largest <= tokens
    on_cpu, on_gpu = (multiplied_rows(config, tokens, it) for it in (False, True))
    assert on_cpu == tokens * chosen <= on_gpu * (1 + 1e-9)
    rows = rows_of_expert(config, tokens, False)
    assert rows <= rows_of_expert(config, tokens + more, False) * (1 + 1e-9)


@pytest.mark.parametrize("config", [QWEN, MIXTRAL], ids=["128 experts", "8 experts"])
@pytest.mark.parametrize("tokens", [64, 512, 4096])
def test_the_largest_group_is_about_that_of_fair_draws(config, tokens):
    random, experts = np.random.default_rng(0), config.num_experts
    scores = random.random((30, tokens, experts))
    chosen = scores.argpartition(config.experts_per_token, axis=2)[..., : config.experts_per_token]
    counts = [np.bincount(each.ravel(), minlength=experts).max() for each in chosen]
    mean = tokens * config.experts_per_token / experts
    surplus = largest_group(config, tokens) - mean
    assert 0.85 * surplus <= np.mean(counts) - mean <= 1.2 * surplus


@pytest.mark.parametrize("machine", ["t4", "rtx4090", "cpu"])
@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_one_expert_for_every_token_costs_what_a_dense_mlp_of_its_size_does(machine, rows):
    hardware = Hardware.preset(machine)
    one = replace(QWEN, num_experts=1, experts_per_token=1, expert_size=6144)
    plan = stage_plan(one, rows, stages_disk=not hardware.device.is_cpu)
    rates = ModelRates(hardware, one, "float16")(rows, rows)
    mixture = expert_products(plan, rows, plan.tile_tokens, decodes=True)
    dense = CostModel(plan)._linear(rows, 3 * one.hidden_size * one.expert_size)
    seconds = [seconds_alone(seconds_by_resource(it, rates)) for it in (mixture, dense)]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.01)
    assert mixture[Resource.DECODE_EXPERT_FLOPS] == dense[Resource.DECODE_FLOPS]


@settings(max_examples=25)
@given(machine=st.sampled_from(sorted(GPUS)), tokens=st.integers(1, 4000), more=st.integers(1, 400))
def test_more_tokens_take_longer_and_no_more_each(machine, tokens, more):
    def seconds(count):
        rates = ModelRates(GPUS[machine], QWEN, "float16")(count, count)
        amounts = expert_products(stage_plan(QWEN, count), count, count, decodes=True)
        return seconds_alone(seconds_by_resource(amounts, rates))

    few, many = seconds(tokens), seconds(tokens + more)
    assert few <= many * (1 + 1e-9)
    assert many / (tokens + more) <= few / tokens * (1 + 1e-9)
    # Nothing is faster than reading what was chosen, and few rows take hardly more.
    read = 3 * QWEN.hidden_size * QWEN.expert_size * 2 * touched_experts(QWEN, tokens)
    least = read / GPUS[machine].device.memory_bytes_per_s
    assert few >= least
    assert tokens > 64 or few <= 1.5 * least
