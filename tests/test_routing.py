"""Routers that score by a sigmoid choose the experts that transformers chooses, in 16 bits too."""

from __future__ import annotations

from dataclasses import replace

import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import tiers
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from flexgen_ray.config import Placement, Policy, Workload
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.models.config import ROUTER_CORRECTION
from flexgen_ray.models.config_files import load_config
from flexgen_ray.models.routing import choose
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.schedule.ops import OpKind
from flexgen_ray.schedule.zigzag import StageLayers, zigzag
from flexgen_ray.store.weights import WeightStore


@st.composite
def routers(draw) -> dict:
    groups, size = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    chosen = draw(st.integers(1, groups))
    return {
        "n_group": groups,
        "topk_group": chosen,
        "n_routed_experts": groups * size,
        "num_experts_per_tok": draw(st.integers(1, chosen * size)),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


@settings(max_examples=60)
@given(keys=routers(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0))
def test_experts_and_shares_are_those_of_transformers(keys, dtype, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    router = Glm4MoeTopkRouter(Glm4MoeConfig(hidden_size=32, **keys))
    weight = torch.randn(keys["n_routed_experts"], 32, generator=generator).to(dtype) / 6
    router.weight.data = weight
    # Corrections as large as a trained model's, which bfloat16 would round to steps of 0.06.
    router.e_score_correction_bias = 9 + torch.randn(len(weight), generator=generator) / 50
    x = torch.randn(7, 32, generator=generator).to(dtype)
    with torch.no_grad():
        _, shares, chosen = router(x)
    config = replace(
        shape_config("glm-4.5-air"),
        num_experts=keys["n_routed_experts"],
        experts_per_token=keys["num_experts_per_tok"],
        expert_groups=keys["n_group"],
        chosen_groups=keys["topk_group"],
        norm_topk=keys["norm_topk_prob"],
        routed_scale=keys["routed_scaling_factor"],
    )
    weights = {"router.weight": weight, ROUTER_CORRECTION: router.e_score_correction_bias}
    ours, experts = choose(config, weights, x)
    # transformers' experts of a token are in no order.
    places, other = chosen.argsort(dim=-1), experts.argsort(dim=-1)
    assert torch.equal(chosen.gather(1, places), experts.gather(1, other))
    torch.testing.assert_close(ours.gather(1, other), shares.gather(1, places).to(dtype))


def test_corrections_stay_in_float32_on_every_tier(tmp_path):
    folder = tiny.save("glm4-moe", tmp_path)
    config, thirds = load_config(folder), Placement(0.3, 0.3, 0.4)
    stage, policy = StageLayers.whole(config.num_layers), Policy(weights=thirds)
    plan = StagePlan(config, stage, policy, Workload(1, 1, 2), "bfloat16")
    source, places = Checkpoint(folder, config), tiers(tmp_path)
    try:
        store = WeightStore(plan, source, places)
        for op in zigzag(stage, 1, range(1)):
            if op.kind is OpKind.READ_WEIGHTS:
                store.read_part(op)
            elif op.kind is OpKind.LOAD_WEIGHTS:
                store.load_part(op)
            elif op.kind is OpKind.PROJECT and config.has_experts(op.layer):
                wanted = torch.empty(config.num_experts)
                source.read_into(op.layer, ROUTER_CORRECTION, wanted)
                assert torch.equal(store.tensors(op)[ROUTER_CORRECTION], wanted)
    finally:
        places.disk.close()
