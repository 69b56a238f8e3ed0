"""The cost model counts what really moves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import UNIT, policies

from flexgen_ray import LLM, SamplingParams
from flexgen_ray.config import PAGE_TOKENS, Placement, Policy, Workload
from flexgen_ray.cost.ops import CostModel
from flexgen_ray.cost.resources import Resource
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Composition, Row, Rows
from flexgen_ray.models.config_files import load_config
from flexgen_ray.schedule.ops import Op, OpKind
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.store.disk import Region


@pytest.mark.parametrize("name", ["opt", "llama", "gemma3"])
@settings(max_examples=10)
@given(policy=policies)
def test_modelled_disk_bytes_are_those_that_were_asked_for(tiny_models, name, policy, monkeypatch):
    """Serially, so that nothing is fetched for a visit that never comes but the first weights."""
    folder, references = tiny_models[name]
    moved = {"read": 0, "written": 0}
    read, write = Region.read_into, Region.write

    def reading(self, buffer, offset=0):
        moved["read"] += buffer.nbytes
        return read(self, buffer, offset)

    def writing(self, buffer, offset=0):
        moved["written"] += buffer.nbytes
        return write(self, buffer, offset)

    prompts = [reference.prompt for reference in references]
    params = SamplingParams(max_tokens=5, temperature=0.0)
    with monkeypatch.context() as patch:
        options = {"policy": policy, "executor": "serial", "use_ray": False, "dtype": "float32"}
        with LLM(folder, hardware=UNIT, **options) as llm:
            requests = [llm.request(i, prompt, params) for i, prompt in enumerate(prompts)]
            llm.prepare(requests)
            patch.setattr(Region, "read_into", reading)
            patch.setattr(Region, "write", writing)
            list(llm.stream(requests))
            layout = llm._plans[0].weights
            modelled = llm.report.stages[0].measured.modelled_resources
            tables = [place.tier == "disk" for place in layout.places[0].values()]
    assert modelled.get("disk_write", 0) == pytest.approx(moved["written"])
    in_vain = sum(
        layout.streams[layer].nbytes("disk") for layer in (1, 2) if layer in layout.streams
    )
    if not any(tables):  # looked-up rows of an embedding on disk are no op of their own
        read_modelled = modelled.get("disk_read", 0)
        assert read_modelled <= moved["read"] + 1e-6
        assert moved["read"] <= read_modelled + in_vain + 1e-6


@given(position=st.integers(0, 30), tokens=st.integers(1, 30))
def test_attention_takes_what_a_layers_window_has(tiny_models, position, tokens):
    """Layer 1 attends all, layer 2 the last nine tokens; one by one on the host."""
    config, stage = load_config(tiny_models["qwen2"][0]), StageLayers.whole(2)
    row = Row(0, position, tokens, 0, True, tokens > 1)
    end = position + tokens
    for cache in (Placement(1, 0, 0), Placement(0, 1, 0)):
        plan = StagePlan(config, stage, Policy(1, cache=cache), Workload(1, end, end), "float32")
        model, composition = CostModel(plan), Composition(Rows((row,), ()), plan.splits)
        for layer, window in ((1, end), (2, 9)):
            kind = OpKind.ATTEND_HOST if cache.cpu and tokens == 1 else OpKind.ATTEND_DEVICE
            found = model.amounts(Op(kind, 0, layer, 0, 0, 0), composition)
            seen = {
                x for at in range(position, end) for x in range(max(0, at + 1 - window), at + 1)
            }
            if kind is OpKind.ATTEND_HOST:
                assert found[Resource.HOST_ATTENTION] == len(seen) * plan.kv_bytes
                continue
            assert found[Resource.DEVICE_ATTENTION] == len(seen) * plan.kv_bytes
            pairs = sum(min(at + 1, window) for at in range(position, end))
            assert found[Resource.FLOPS] == 4 * config.q_size * pairs


@given(decoding=st.integers(0, 4), prompts=st.integers(0, 3), length=st.sampled_from([2, 30, 48]))
def test_only_tokens_that_fill_no_page_are_placed_one_by_one(
    tiny_models, decoding, prompts, length
):
    config, stage = load_config(tiny_models["opt"][0]), StageLayers.whole(2)
    if not decoding + prompts:
        return
    policy = Policy(8, cache=Placement(0, 1, 0))
    plan = StagePlan(config, stage, policy, Workload(8, 600, 700), "float32")
    news = [1] * decoding + [length] * prompts
    rows = tuple(Row(i, 0, n, sum(news[:i]), True, n > 1) for i, n in enumerate(news))
    amounts = CostModel(plan).amounts(
        Op(OpKind.APPEND_CACHE, 0, 1, 0, 0, 0), Composition(Rows(rows, ()), plan.splits)
    )
    loose = decoding + prompts * (length % PAGE_TOKENS)
    assert amounts[Resource.APPEND] == loose * plan.kv_bytes
    assert amounts[Resource.HOST_MEMORY] == 2 * loose * plan.kv_bytes
