"""Runs whose rows enter, grow, are set back and end at any time lose no token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import pipelines, policies

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.layout import admission
from flexgen_ray.layout.admission import Admission
from flexgen_ray.layout.pages import StagePages
from flexgen_ray.planner import choose

LENGTHS = [
    (40, 30), (1, 45), (3, 2), (17, 16), (16, 1), (30, 33), (5, 5), (2, 31), (33, 20), (1, 1),
]  # fmt: skip


NAMES = ["llama", "gemma3", "phi3"]  # layers without windows, of both kinds, and with windows


@pytest.fixture(scope="module")
def expected(tiny_models) -> dict[str, list[list[int]]]:
    """Tokens where every row has all the pages that it may ever need."""
    return {name: tokens_of(tiny_models, name, Policy(len(LENGTHS)), "serial") for name in NAMES}


@pytest.fixture
def short_of_pages(monkeypatch):
    """Runs have as many pages as rows take on average, and let rows in without looking ahead."""
    monkeypatch.setattr(choose, "with_spare_pages", lambda plans, *others: plans)
    monkeypatch.setattr(admission, "peak_pages", lambda *_: 0)


def tokens_of(tiny_models, name: str, policy, executor: str, **options) -> list[list[int]]:
    return run(tiny_models, name, policy, executor, **options)[0]


def run(tiny_models, name: str, policy, executor: str, **options) -> tuple[list[list[int]], int]:
    """Tokens of the answers, and the number of tokens that were computed again."""
    folder, _ = tiny_models[name]
    rng = random.Random(3)
    prompts = [[rng.randrange(90) for _ in range(length)] for length, _ in LENGTHS]
    params = [SamplingParams(most, temperature=0.0, ignore_eos=True) for _, most in LENGTHS]
    options |= {"policy": policy, "executor": executor, "use_ray": False, "dtype": "float32"}
    with LLM(folder, **options) as llm:
        outputs = llm.generate(prompts, params)
        again = llm.report.recomputed_tokens
    return [output.outputs[0].token_ids for output in outputs], again


@settings(max_examples=6)
@given(name=st.sampled_from(NAMES), policy=policies, executor=st.sampled_from(["serial", "async"]))
def test_rows_that_lack_pages_lose_no_token(
    tiny_models, expected, short_of_pages, name, policy, executor
):
    assert tokens_of(tiny_models, name, policy, executor) == expected[name]


@settings(max_examples=4)
@given(
    name=st.sampled_from(["llama", "gemma3"]),
    pipeline=pipelines(num_layers=3),
    executor=st.sampled_from(["serial", "async"]),
)
def test_nor_in_a_pipeline(tiny_models, expected, short_of_pages, name, pipeline, executor):
    stages = {"pipeline_parallel_size": len(pipeline.layers)}
    assert tokens_of(tiny_models, name, pipeline, executor, **stages) == expected[name]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("executor", ["serial", "async"])
@pytest.mark.parametrize("stages", [1, 2])
def test_rows_that_move_to_other_batches_lose_no_token(
    tiny_models, expected, monkeypatch, name, executor, stages
):
    moves, move = [], StagePages.move
    monkeypatch.setattr(StagePages, "move", lambda *args: (moves.append(args), move(*args)))
    # A cache in host memory keeps two batches for each stage; here it leaves enough to gather.
    cache = Placement(1, 0, 0) if stages == 1 else Placement(0.4, 0.6, 0)
    policy = Policy(2, 5, cache=cache, cpu_attention=0.5)
    options = {} if stages == 1 else {"pipeline_parallel_size": stages}
    assert tokens_of(tiny_models, name, policy, executor, **options) == expected[name]
    assert moves


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_rows_are_set_back_where_admission_lets_too_many_in(
    tiny_models, expected, short_of_pages, name
):
    policy = Policy(2, 2, cache=Placement(0.5, 0.5, 0))
    tokens, again = run(tiny_models, name, policy, "async")
    assert tokens == expected[name]
    assert again > 0


@pytest.mark.parametrize("executor", ["serial", "async"])
def test_equal_rows_that_enter_one_by_one_lose_no_token(tiny_models, monkeypatch, executor):
    folder, _ = tiny_models["llama"]
    rng = random.Random(4)
    prompts = [[rng.randrange(90) for _ in range(4)] for _ in range(36)]
    params = SamplingParams(60, temperature=0.0, ignore_eos=True)
    options = {"policy": Policy(4, 2), "executor": executor, "use_ray": False, "dtype": "float32"}
    with LLM(folder, **options) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    paces, pace = [], Admission.pace
    monkeypatch.setattr(
        Admission, "pace", lambda *args: paces.append(pace(*args)) or paces[-1]
    )  # fmt: skip
    # Rows of 4 pages at their end have 3 each.
    monkeypatch.setattr(
        choose,
        "with_spare_pages",
        lambda plans, *others: [replace(plan, pages_per_row=3) for plan in plans],
    )
    with LLM(folder, **options) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert not llm.report.recomputed_tokens
    assert tokens == expected
    assert any(paces)
