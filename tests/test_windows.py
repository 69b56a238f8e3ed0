"""Layers with a window keep the pages that it touches, on every tier; no token depends on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from copies import Copies
from engine_runs import assert_same, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import REAL, UNIT, llama, policies

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.cli.bench.workload import live_tokens
from flexgen_ray.config import PAGE_TOKENS, Budget, Workload
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import stage_bytes
from flexgen_ray.planner.fill import fill_tiers
from flexgen_ray.schedule.ops import OpKind
from flexgen_ray.schedule.zigzag import StageLayers

PROMPTS = [
    [(7 * place + 3 * length) % 90 + 4 for place in range(length)]
    for length in (90, 1, 47, 16, 64, 33)
]
LONG = {"mistral": 23, "gemma3": 17, "qwen2": 35}  # windows longer than a page


@pytest.fixture(scope="module")
def long_windows(tmp_path_factory):
    """{name: (folder, references)} of models with long windows, and prompts that are longer."""
    models = {}
    for name, window in LONG.items():
        folder = tiny.save(name, tmp_path_factory.mktemp(name), sliding_window=window)
        models[name] = folder, tiny.references(folder, PROMPTS, 12)
    return models


@settings(max_examples=8)
@given(name=st.sampled_from(sorted(LONG)), policy=policies)
def test_prompts_longer_than_the_window_in_one_chunk_or_several(long_windows, name, policy):
    folder, references = long_windows[name]
    assert_same(greedy(folder, PROMPTS, policy, use_ray=False), references)


def plan_of(config, lengths: tuple[int, int], policy: Policy) -> StagePlan:
    prompt, longest = lengths
    stage = StageLayers.whole(config.num_layers)
    return StagePlan(config, stage, policy, Workload(999, prompt, longest), "float32")


SHAPE = llama(4, 64, 4, 2, 96, 300)
WINDOWED = replace(SHAPE, sliding_window=100)
MIXED = replace(WINDOWED, full_attention_layers=(2,))


def test_a_stage_has_pools_for_each_kind_of_its_layers():
    def windows(config, lengths) -> list[int | None]:
        return [kind.window for kind in plan_of(config, lengths, Policy(4)).kinds]

    shapes = SHAPE, WINDOWED, MIXED
    assert [windows(it, (500, 600)) for it in shapes] == [[None], [100], [None, 100]]
    # A window that touches as many pages as the longest row has saves none.
    assert windows(MIXED, (50, 120)) == [None]
    plan = plan_of(MIXED, (500, 600), Policy(4))
    assert [plan.kind_of(layer).window for layer in (1, 2, 3, 4)] == [100, None, 100, 100]
    assert plan.space.pools == ((4 * 38, 0, 0), (4 * 8, 0, 0))
    assert stage_bytes(plan)["gpu"]["cache"] == 4 * plan.page_bytes * (38 + 3 * 8)


def test_the_same_memory_holds_more_rows():
    """Plans of Llama 3 8B's shape, with windows in no layer, in five of six, and in all."""
    shape = replace(REAL["llama-3-8b"], num_layers=30)
    mixed = replace(shape, sliding_window=1024, full_attention_layers=(6, 12, 18, 24, 30))
    windowed = replace(mixed, full_attention_layers=())
    budget = Budget(24 * 2**30, 60 * 2**30, 0)

    def rows(config) -> int:
        plan = plan_of(config, (7000, 7500), Policy(max_batch_tokens=512))
        (filled,) = fill_tiers([replace(plan, dtype="float16")], [budget])
        return filled.policy.block_size

    some, more, most = map(rows, (shape, mixed, windowed))
    assert 10 <= some and more >= 3 * some and most >= 6 * some


@given(st.integers(1, 40), st.integers(1, 40), st.none() | st.integers(1, 60))
def test_live_tokens_are_those_that_layers_keep(prompt, new, window):
    live = [min(prompt + count, window or 99) for count in range(new)]
    assert live_tokens([(prompt, new)], window) == sum(live)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_the_link_carries_the_pages_that_windows_touch(long_windows, name, monkeypatch):
    """Prompts and then five tokens of rows of many lengths, all in host memory and streamed.

    The cost model says the same.
    """
    folder, _ = long_windows[name]
    policy = Policy(len(PROMPTS), max_batch_tokens=512, cache=Placement(0, 1, 0), cpu_attention=0.0)
    copies = Copies(monkeypatch)
    options = {"dtype": "float32", "use_ray": False, "executor": "serial", "hardware": UNIT}
    with LLM(folder, policy=policy, **options) as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))
        (plan,) = llm._plans
        modelled = llm.report.stages[0].measured.modelled_resources
    layers = [plan.config.window(layer) for layer in plan.stage.decoders]
    loaded = 0
    for step in range(1, 6):
        pages = 0
        for window in layers:
            for position in (len(prompt) + step - 1 for prompt in PROMPTS):
                first = max(0, position + 1 - (window or position + 1)) // PAGE_TOKENS
                pages += -(-position // PAGE_TOKENS) - first
        assert copies.moved[OpKind.LOAD_CACHE, step] == pages * plan.page_bytes
        loaded += pages * plan.page_bytes
    assert modelled["h2d"] == loaded
    stored = 0
    for window in layers:
        for length in map(len, PROMPTS):
            first = max(0, length - (window or length)) // PAGE_TOKENS
            stored += length - PAGE_TOKENS * first
    assert copies.moved[OpKind.STORE_CACHE, 0] == stored * plan.kv_bytes
    decoded = 5 * len(PROMPTS) * len(layers) * plan.qkv_size * plan.element_bytes
    assert modelled["d2h"] == stored * plan.kv_bytes + decoded
