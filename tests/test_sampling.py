"""Sampling inverts the exact distribution, and the batch around a request never changes it."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.runtime.sampler import Draw, sample, uniform

DRAWS = 4000
CHI_SQUARE_LIMIT = {3: 16.3, 4: 18.5, 5: 20.5, 7: 24.3}  # p = 0.001 by degrees of freedom


def counts(logits: list[float], **params) -> Counter:
    sampling = SamplingParams(**params)
    rows = torch.tensor([logits] * DRAWS)
    draws = [
        Draw(sampling.temperature, sampling.top_p, uniform(11, 5, position))
        for position in range(DRAWS)
    ]
    return Counter(sample(rows, draws).tolist())


def chi_square(seen: Counter, expected: torch.Tensor) -> float:
    return sum(
        (seen[token] - DRAWS * p) ** 2 / (DRAWS * p)
        for token, p in enumerate(expected.tolist())
        if p > 0
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits = [0.1, 2.0, -1.0, 1.3, 0.7, 0.2]
    expected = torch.softmax(torch.tensor(logits) / temperature, dim=-1)
    assert chi_square(counts(logits, temperature=temperature), expected) < CHI_SQUARE_LIMIT[5]


def test_top_p_keeps_the_nucleus_and_its_proportions():
    probabilities = torch.tensor([0.4, 0.05, 0.25, 0.15, 0.1, 0.05])
    seen = counts(probabilities.log().tolist(), top_p=0.75)
    nucleus = torch.tensor([0.5, 0, 0.3125, 0.1875, 0, 0])
    assert set(seen) == {0, 2, 3}
    assert chi_square(seen, nucleus) < CHI_SQUARE_LIMIT[3]


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=40), st.floats(0.001, 1), st.floats(0, 1))
@settings(max_examples=200)
def test_a_draw_is_always_inside_the_nucleus(logits, top_p, number):
    params = SamplingParams(top_p=top_p)
    (token,) = sample(
        torch.tensor([logits]), [Draw(params.temperature, params.top_p, min(number, 1 - 2**-53))]
    ).tolist()
    probabilities = torch.softmax(torch.tensor(logits).double(), dim=-1)
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < top_p + 1e-9


def test_temperature_zero_is_greedy():
    greedy = Draw(0.0, 1.0, 0.9)
    assert sample(torch.tensor([[1.0, 3.0, 2.0]]), [greedy]).tolist() == [1]


def test_uniform_numbers_are_uniform_and_reproducible():
    numbers = [
        uniform(seed, stream, p) for seed in (0, 1) for stream in (2, 3) for p in range(1000)
    ]
    assert len(set(numbers)) == len(numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert sum((tenths[i] - 400) ** 2 / 400 for i in range(10)) < 27.9  # p = 0.001, 9 degrees
    assert uniform(1, 2, 3) == uniform(1, 2, 3)


def test_the_batch_around_a_request_never_changes_its_tokens(tiny_models):
    folder, _ = tiny_models["llama"]
    prompts = tiny.prompts(6, 20, seed=3)
    params = [SamplingParams(max_tokens=10, temperature=1.0, seed=s) for s in (1, 2, 3, 4, 5, 6)]

    def run(policy, chosen):
        with LLM(folder, policy=policy, use_ray=False, dtype="float32") as llm:
            outputs = llm.generate([prompts[i] for i in chosen], [params[i] for i in chosen])
            return {
                i: output.outputs[0].token_ids for i, output in zip(chosen, outputs, strict=True)
            }

    everything = run(Policy(6, 1), range(6))
    alone = run(Policy(1, 1), [4])
    reversed_order = run(Policy(2, 2), [5, 4, 3, 2, 1, 0])
    assert alone[4] == everything[4]
    assert reversed_order == everything
    assert len({tuple(tokens) for tokens in everything.values()}) == 6


def test_the_same_seed_gives_the_same_answer_wherever_the_request_stands(tiny_models):
    folder, _ = tiny_models["llama"]
    (prompt,) = tiny.prompts(1, 20, seed=9)
    params = SamplingParams(max_tokens=10, seed=42)
    with LLM(folder, policy=Policy(3, 1), use_ray=False, dtype="float32") as llm:
        answers = [o.outputs[0].token_ids for o in llm.generate([prompt] * 3, params)]
        unseeded = [o.outputs[0].token_ids for o in llm.generate([prompt] * 3, SamplingParams())]
    assert answers[0] == answers[1] == answers[2]
    assert unseeded[0] != unseeded[1]
