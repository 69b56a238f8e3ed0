"""Runs whose rows enter, grow, are set back and end at any time lose no token."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import pipelines, policies

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.layout import admission
from flexgen_ray.planner import choose

LENGTHS = [
    (40, 30), (1, 45), (3, 2), (17, 16), (16, 1), (30, 33), (5, 5), (2, 31), (33, 20), (1, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tiny_models) -> list[list[int]]:
    """Tokens where every row has all the pages that it may ever need."""
    return tokens_of(tiny_models, Policy(len(LENGTHS)), "serial")


@pytest.fixture
def short_of_pages(monkeypatch):
    """Runs have as many pages as rows take on average, and let rows in without looking ahead."""
    monkeypatch.setattr(choose, "with_spare_pages", lambda plans, *others: plans)
    monkeypatch.setattr(admission, "peak_pages", lambda rows: 0)


def tokens_of(tiny_models, policy, executor: str, **options) -> list[list[int]]:
    return run(tiny_models, policy, executor, **options)[0]


def run(tiny_models, policy, executor: str, **options) -> tuple[list[list[int]], int]:
    """Tokens of the answers, and the number of tokens that were computed again."""
    folder, _ = tiny_models["llama"]
    rng = random.Random(3)
    prompts = [[rng.randrange(90) for _ in range(length)] for length, _ in LENGTHS]
    params = [SamplingParams(most, temperature=0.0, ignore_eos=True) for _, most in LENGTHS]
    options |= {"policy": policy, "executor": executor, "use_ray": False, "dtype": "float32"}
    with LLM(folder, **options) as llm:
        outputs = llm.generate(prompts, params)
        again = llm.report.recomputed_tokens
    return [output.outputs[0].token_ids for output in outputs], again


@settings(max_examples=8)
@given(policy=policies, executor=st.sampled_from(["serial", "async"]))
def test_rows_that_lack_pages_lose_no_token(
    tiny_models, expected, short_of_pages, policy, executor
):
    assert tokens_of(tiny_models, policy, executor) == expected


@settings(max_examples=5)
@given(pipeline=pipelines(num_layers=3), executor=st.sampled_from(["serial", "async"]))
def test_nor_in_a_pipeline(tiny_models, expected, short_of_pages, pipeline, executor):
    stages = {"pipeline_parallel_size": len(pipeline.layers)}
    assert tokens_of(tiny_models, pipeline, executor, **stages) == expected


def test_rows_are_set_back_where_admission_lets_too_many_in(tiny_models, expected, short_of_pages):
    policy = Policy(2, 2, cache=Placement(0.5, 0.5, 0))
    tokens, again = run(tiny_models, policy, "async")
    assert tokens == expected
    assert again > 0
