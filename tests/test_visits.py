"""How long a job of mixed lengths takes: as predicted by its visits, and as its passes are played.

The scheduler composes every pass of the job, and the simulation plays them; the planner knows
lengths alone.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played_jobs import play, requests_of

from benchmarks import paper_machines as t4
from flexgen_ray.cli.bench.lengths import MIXTURES, draw, scale
from flexgen_ray.config import PAGE_TOKENS, Budget
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.choose import planned_job
from flexgen_ray.planner.fill import with_spare_pages
from flexgen_ray.planner.pipeline_plan import ModelRates, StageDevice
from flexgen_ray.planner.search import Planner, find_best_plan
from flexgen_ray.planner.visits import visits_of
from flexgen_ray.runtime.prefixes import NOTHING_SHARED, find_prefixes

MIB = 2**20
GPU, WEIGHTS = 3200 * MIB, 3700 * MIB  # bytes in which three layers of OPT-30B cross the link
EQUAL = [(128, 32)] * 64


def t4_device(budget: Budget) -> StageDevice:
    return StageDevice(lambda *rows: t4.MACHINE, budget)


def preset_device(name: str, budget: Budget) -> StageDevice:
    hardware = Hardware.preset(name)
    rates = ModelRates(hardware, shape_config("llama-3-8b"), "float16")
    return StageDevice(rates, budget, "", hardware.core_shares)


def lengths_of(name: str, count: int, longest: int) -> list[tuple[int, int]]:
    return EQUAL if name == "equal" else scale(draw(MIXTURES[name].make(), count), longest)


@pytest.mark.parametrize("name", ["conversations", "long-answers", "equal"])
@pytest.mark.parametrize("cache", [40 * MIB, 240 * MIB, 640 * MIB])
def test_a_job_takes_as_long_as_predicted(name, cache):
    """OPT-30B on the paper's T4, in memory for few requests and for many: within 15 %."""
    config = replace(shape_config("opt-30b"), num_layers=3, vocab_size=8192)
    lengths = lengths_of(name, 96, 256 if name == "long-answers" else 512)
    budget = Budget(GPU, WEIGHTS + cache, 0)
    assert_predicted(config, t4_device(budget), budget, lengths)


@pytest.mark.parametrize("name", ["conversations", "long-answers"])
@pytest.mark.parametrize("preset", ["rtx4090", "h100"])
def test_a_job_on_a_fast_gpu_takes_as_long_as_predicted(name, preset):
    """Llama-3-8B where all fits the GPU, so that products and Python's issuing bind."""
    config = replace(shape_config("llama-3-8b"), num_layers=3)
    budget = Budget(6000 * MIB, 2000 * MIB, 0)
    assert_predicted(config, preset_device(preset, budget), budget, lengths_of(name, 64, 256))


@pytest.mark.parametrize("gpu", [2600 * MIB, 6000 * MIB])
def test_a_job_of_a_model_in_which_some_layers_have_windows_takes_as_long_as_predicted(gpu):
    """Three layers of four have windows; the cache is on the GPU, or weights cross the link."""
    windows = {"sliding_window": 32, "full_attention_layers": (4, 8)}
    config = replace(shape_config("llama-3-8b"), num_layers=8, vocab_size=8192, **windows)
    budget = Budget(gpu, 6000 * MIB, 0)
    lengths = lengths_of("long-answers", 64, 256)
    assert_predicted(config, preset_device("rtx4090", budget), budget, lengths)


@pytest.mark.parametrize(
    ("count", "shared", "groups", "cache"),
    [(48, 400, 1, 40 * MIB), (48, 400, 6, 640 * MIB), (150, 96, 3, 240 * MIB)],
)
def test_a_job_of_prompts_that_share_takes_as_long_as_predicted(count, shared, groups, cache):
    config = replace(shape_config("opt-30b"), num_layers=3, vocab_size=8192)
    budget = Budget(GPU, WEIGHTS + cache, 0)
    lengths = [(shared + 40, 12)] * count
    stage = assert_predicted(config, t4_device(budget), budget, lengths, shared, groups)
    assert stage.prefix_pages >= shared // PAGE_TOKENS


def assert_predicted(config, device, budget, lengths, shared=0, groups=1):
    requests = requests_of(lengths, shared, groups)
    prefixes = find_prefixes(requests) if shared else NOTHING_SHARED
    job = planned_job(requests, prefixes)
    job = replace(job, prompt_len=max(prompt for prompt, _ in lengths))
    planner = Planner(config, (device,), job, "float16")
    plan = find_best_plan(planner)
    (stage,) = with_spare_pages(plan.stages, [budget])
    (rates,) = planner.rates(stage.policy)
    played = play(stage, rates, requests, device.core_shares)
    assert plan.job_seconds == pytest.approx(played.seconds, rel=0.15)
    if plan.kinds:
        # The engine gives rows the memory that is left, so the longest may begin a little earlier.
        assert sum(plan.kinds.values()) == pytest.approx(played.visits, rel=0.2)
    return stage


some_lengths = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 100)), min_size=1, max_size=60
)


@settings(max_examples=40)
@given(some_lengths, st.integers(1, 40), st.integers(1, 600), st.integers(1, 200))
def test_no_visit_holds_more_than_the_block_and_nothing_is_lost(lengths, rows, tokens, pages):
    """Every prompt's tokens are brought once, and every token of an answer takes a row's visit."""
    ordered = tuple(sorted(lengths, key=lambda it: (-sum(it), -it[0])))
    tokens = max(tokens, rows + 1)
    kinds = visits_of(ordered, len(ordered), rows, tokens, pages)
    prompts, answers = (sum(each) for each in zip(*ordered, strict=True))
    count = sum(each.count for each in kinds)
    assert sum(each.count * each.prompt_tokens for each in kinds) == pytest.approx(prompts)
    decoded = sum(each.count * each.decoding for each in kinds)
    assert decoded == pytest.approx(answers - len(ordered))
    assert count >= max(ceil(answers / rows), max(answer for _, answer in ordered))
    for each in kinds:
        assert each.decoding <= rows * (1 + 1e-9)
        assert each.decoding + each.prompt_tokens <= tokens * (1 + 1e-9)


@settings(max_examples=40)
@given(some_lengths, st.integers(1, 8))
def test_a_job_so_many_times_as_large_takes_that_much_longer_in_its_middle(lengths, times):
    """A large job begins and ends as a smaller one does."""
    ordered = tuple(sorted(lengths, key=lambda it: (-sum(it), -it[0])))
    count = 1000 * len(ordered)
    once, more = (
        sum(each.count for each in visits_of(ordered, number, 4, 2000, 10**6))
        for number in (count, times * count)
    )
    answers = sum(answer for _, answer in ordered)
    assert more == pytest.approx(once + (times - 1) * 1000 * answers / 4, rel=0.1)
