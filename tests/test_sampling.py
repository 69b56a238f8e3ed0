"""Sampling inverts the exact distribution, and the batch around a request never changes it."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.kernels.sampling import (
    Penalties,
    SamplingRow,
    apply_penalties,
    largest_logits,
    sample,
    uniform_number,
)
from flexgen_ray.text.tokenizer import Tokenizer

DRAWS = 4000
CHI_SQUARE_LIMIT = {3: 16.3, 4: 18.5, 5: 20.5, 7: 24.3}  # p = 0.001 by degrees of freedom


def counts(logits: list[float], **params) -> Counter:
    sampling = SamplingParams(**params)
    rows = torch.tensor([logits] * DRAWS)
    draws = [
        SamplingRow(
            sampling.temperature,
            sampling.top_p,
            uniform_number(11, 5, position),
            top_k=sampling.top_k,
            min_p=sampling.min_p,
        )
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
        torch.tensor([logits]),
        [SamplingRow(params.temperature, params.top_p, min(number, 1 - 2**-53))],
    ).tolist()
    probabilities = torch.softmax(torch.tensor(logits).double(), dim=-1)
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < top_p + 1e-9


def test_temperature_zero_is_greedy():
    greedy = SamplingRow(0.0, 1.0, 0.9)
    assert sample(torch.tensor([[1.0, 3.0, 2.0]]), [greedy]).tolist() == [1]


def test_uniform_numbers_are_uniform_and_reproducible():
    numbers = [
        uniform_number(seed, stream, p) for seed in (0, 1) for stream in (2, 3) for p in range(1000)
    ]
    assert len(set(numbers)) == len(numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert sum((tenths[i] - 400) ** 2 / 400 for i in range(10)) < 27.9  # p = 0.001, 9 degrees
    assert uniform_number(1, 2, 3) == uniform_number(1, 2, 3)


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


def reference_token(logits: list[float], draw: SamplingRow) -> int:
    """One token by plain loops: bias, penalties, bans, temperature, min_p, top_k, top_p."""
    if draw.forced_token is not None:
        return draw.forced_token
    values = list(logits)
    for token, bias in draw.bias:
        values[token] += bias
    its = draw.penalties
    for token in range(len(values)):
        said = dict(its.answer) if its else {}
        if its and token in (*its.prompt, *said):
            positive = values[token] > 0
            values[token] *= 1 / its.repetition if positive else its.repetition
        if its and token in said:
            values[token] -= its.frequency * said[token] + its.presence
        if token in draw.banned or (draw.allowed is not None and token not in draw.allowed):
            values[token] = float("-inf")
    order = sorted(range(len(values)), key=lambda token: -values[token])
    if draw.temperature == 0:
        return order[0]
    weights = [math.exp((values[t] - values[order[0]]) / draw.temperature) for t in order]
    kept = [w for w in weights if w >= draw.min_p][: draw.top_k or None]
    nucleus, reached = [], 0.0
    for weight in kept:
        nucleus.append(weight)
        reached += weight
        if reached >= draw.top_p * sum(kept):
            break
    number, passed = draw.uniform_number * sum(nucleus), 0.0
    for token, weight in zip(order, nucleus, strict=False):
        passed += weight
        if passed > number:
            return token
    return order[len(nucleus) - 1]


@st.composite
def draws_of(draw, size=13):
    tokens = st.lists(st.integers(0, size - 1), max_size=8).map(tuple)
    penalty, maybe = st.floats(-2, 2), draw(st.integers(0, 3))
    said = tokens.map(lambda them: tuple(Counter(them).items()))
    penalties = st.builds(Penalties, penalty, penalty, st.floats(0.3, 3), tokens, said)
    banned = draw(st.lists(st.integers(0, size - 1), max_size=4).map(tuple))
    allowed = st.sets(st.integers(0, size - 1), min_size=5).map(sorted).map(tuple)
    bias = st.dictionaries(st.integers(0, size - 1), st.integers(-100, 100), max_size=4)
    return SamplingRow(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_p=draw(st.floats(0.05, 1)),
        uniform_number=draw(st.floats(0, 0.999)),
        forced_token=draw(st.none() | st.integers(0, size - 1)) if maybe == 0 else None,
        top_k=draw(st.integers(0, size + 2)),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.4, 1.0])),
        banned=banned,
        penalties=draw(st.none() | penalties),
        allowed=draw(st.none() | allowed),
        bias=tuple(draw(bias).items()),
    )


@given(st.lists(draws_of(), min_size=1, max_size=30), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_mixed_rows_are_those_of_a_plain_loop(draws, seed):
    logits = 3 * torch.randn(len(draws), 13, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    chosen = sample(logits, draws).tolist()
    assert torch.equal(logits, before)  # scores are taken from them afterwards
    assert chosen == [reference_token(*pair) for pair in zip(before.tolist(), draws, strict=True)]


LOGITS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.5, -1.5])


@given(st.lists(LOGITS, min_size=1, max_size=60), st.integers(1, 60))
@settings(max_examples=200)
def test_the_likeliest_are_those_of_a_stable_sort(logits, count):
    """Of any numbers, infinite and equal ones too, and however few are asked for."""
    rows = torch.tensor([logits, logits[::-1]])
    values, tokens = largest_logits(rows, min(count, len(logits)))
    wanted = rows.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(tokens, wanted.indices[:, :count])
    assert torch.equal(values, wanted.values[:, :count])


@pytest.mark.parametrize("repetition", [5e-324, 1e-40, 1e40, 1e308])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_beyond_all_bounds_still_leaves_a_distribution(repetition, temperature):
    """Of tokens with logits of either sign, or of none."""
    its = Penalties(0.0, 0.0, repetition, (0, 1, 2), ((1, 2),))
    draw = SamplingRow(temperature, 1.0, 0.5, penalties=its)
    row = torch.tensor([[3.0, -3.0, 0.0, 2.0]])
    penalised = row[0].clone()
    apply_penalties(penalised, its)
    assert penalised.isfinite().all()
    largest = 0 if repetition < 1 else 3
    assert sample(row, [draw]).tolist() == [largest]


def test_min_p_and_top_k_keep_the_likeliest_and_their_proportions():
    probabilities = torch.tensor([0.4, 0.05, 0.25, 0.15, 0.1, 0.05])
    logits = probabilities.log().tolist()
    expected = torch.tensor([0.5, 0, 0.3125, 0.1875, 0, 0])
    for params in ({"top_k": 3}, {"min_p": 0.3}, {"top_k": 3, "min_p": 0.01}):
        seen = counts(logits, **params)
        assert set(seen) == {0, 2, 3}
        assert chi_square(seen, expected) < CHI_SQUARE_LIMIT[3]


@pytest.mark.parametrize("stages", [1, 2])
def test_greedy_with_repetition_penalty_equals_transformers(tiny_models, stages):
    folder, _ = tiny_models["llama"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = tiny.prompts(3, 20, seed=3)
    wanted = [tiny.generate(model, it, 16, repetition_penalty=1.8).tokens for it in prompts]
    plain = tiny.generate(model, prompts[0], 16).tokens
    params = [SamplingParams(16, 0.0, repetition_penalty=1.8)] * 3 + [SamplingParams(16, 0.0)]
    pipeline = {"pipeline_parallel_size": stages}
    with LLM(folder, policy=Policy(2, 2), use_ray=False, dtype="float32", **pipeline) as llm:
        outputs = llm.generate([*prompts, prompts[0]], params)
    tokens = [output.outputs[0].token_ids for output in outputs]
    assert tokens == [*wanted, plain]
    assert wanted[0] != plain


@pytest.mark.parametrize("stages", [1, 2])
def test_biased_and_limited_tokens_are_those_of_transformers(tiny_models, stages):
    """Greedily; and drawn ones keep to the same limits, whatever the number of stages."""
    folder, _ = tiny_models["llama"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (prompt,) = tiny.prompts(1, 20, seed=3)
    plain = tiny.generate(model, prompt, 16).tokens
    bias = {plain[0]: -100.0, plain[1]: 2.5, 9: 1.5}
    allowed = sorted({*range(5, 60), plain[3]} - {plain[2]})
    words = [[plain[1]], plain[3:5], plain[4:8]]
    asked = [
        ({"logit_bias": bias}, {"sequence_bias": {(token,): it for token, it in bias.items()}}),
        ({"bad_words": words}, {"bad_words_ids": words}),
        ({"allowed_token_ids": allowed}, {"prefix_allowed_tokens_fn": lambda _, ids: allowed}),
    ]
    asked.append(tuple({k: v for it in asked for k, v in it[i].items()} for i in (0, 1)))
    wanted = [tiny.generate(model, prompt, 16, **theirs).tokens for _, theirs in asked]
    drawn = SamplingParams(16, 1.5, seed=5, **asked[-1][0])
    params = [SamplingParams(16, 0.0, **ours) for ours, _ in asked] + [drawn]
    pipeline = {"pipeline_parallel_size": stages}
    with LLM(folder, policy=Policy(3, 2), use_ray=False, dtype="float32", **pipeline) as llm:
        outputs = llm.generate([prompt] * 5, params)
    tokens = [output.outputs[0].token_ids for output in outputs]
    assert tokens[:4] == wanted and plain not in wanted
    assert set(tokens[4]) <= set(allowed) - {plain[1]}
    for word in words:
        pieces = [tokens[4][at : at + len(word)] for at in range(16)]
        assert word not in pieces


def test_a_bad_word_is_looked_for_in_the_answer_alone(text_model):
    """With a space before it too; and what a resumed answer has already counts."""
    greedy = SamplingParams(12, 0.0)
    with LLM(text_model, policy=Policy(2, 1), use_ray=False, dtype="float32") as llm:
        (free,) = llm.generate("Hello", greedy)
        text, tokens = free.outputs[0].text, free.outputs[0].token_ids
        (without,) = llm.generate("Hello", replace(greedy, bad_words=text[2:4]))
        (kept,) = llm.generate("Hello", replace(greedy, bad_words=["o" + text[0]]))
        request = llm.request(0, "Hello", replace(greedy, bad_words=[text[2:4]]))
        llm.prepare([request])
        (resumed,) = llm.stream([replace(request, generated=tokens[:3])])
    assert without.outputs[0].text[:3] == text[:3] and without.outputs[0].text[3] != text[3]
    assert resumed.outputs == without.outputs and kept.outputs[0].text[0] == text[0]


def test_words_are_banned_with_and_without_a_space_as_in_vllm(text_model, monkeypatch):
    """With a space only where that makes as many tokens and another first one."""
    tokenizer = Tokenizer(text_model)
    assert tokenizer.bad_word(" Hi") == [tuple(ord(it) - 30 for it in "Hi")]
    assert tokenizer.bad_word((5, 6)) == [(5, 6)]
    ids = {"Hi": [7, 8], " Hi": [9, 8], "no": [7], " no": [7], "": [], " ": [3]}
    monkeypatch.setattr(tokenizer.hf, "encode", lambda text, **_: ids[text])
    assert tokenizer.bad_word("Hi") == [(7, 8), (9, 8)]
    assert tokenizer.bad_word("no") == [(7,)]
    with pytest.raises(ValueError, match="has no tokens; remove it"):
        tokenizer.bad_word("")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"allowed_token_ids": [5], "bad_words": [[5]]}, "leave no token to choose; allow more"),
        ({"allowed_token_ids": [5, 6], "bad_words": [[5, 5], [6]]}, r"choose after \[5\]"),
        ({"allowed_token_ids": [5, 6], "bad_words": [[5, 6], [6, 5], [6, 6], [5, 5]]}, "choose a"),
        ({"allowed_token_ids": [5, 6], "bad_words": [[6, 5, 5], [5, 6]]}, r"after \[6, 5\]"),
        ({"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 2}, "no token to choose"),
        ({"allowed_token_ids": [97]}, "token id 97 is outside the vocabulary of 97"),
        ({"logit_bias": {"97": 1}}, "token id 97 is outside the vocabulary of 97"),
        ({"bad_words": [[5, 97]]}, "token id 97 is outside the vocabulary of 97"),
    ],
)
def test_limits_that_leave_no_token_are_refused_before_the_run(text_model, params, said):
    with LLM(text_model, use_ray=False) as llm:
        with pytest.raises(ValueError, match=said):
            llm.request(0, "Hello", SamplingParams(**params))
        # What can't come about is no fault.
        llm.request(
            0, "Hello", SamplingParams(allowed_token_ids=[5, 6], bad_words=[[7, 5], [7, 6]])
        )


def test_a_resumed_answer_is_penalised_for_all_of_its_tokens(tiny_models):
    folder, _ = tiny_models["llama"]
    (prompt,) = tiny.prompts(1, 20, seed=9)
    params = SamplingParams(
        12, seed=4, repetition_penalty=1.3, presence_penalty=1.5, frequency_penalty=0.7, top_k=40
    )
    with LLM(folder, policy=Policy(1, 1), use_ray=False, dtype="float32") as llm:
        request = llm.request(0, prompt, params)
        llm.prepare([request])
        (whole,) = llm.stream([request])
        tokens = whole.outputs[0].token_ids
        (resumed,) = llm.stream([replace(request, generated=tokens[:5])])
    assert resumed.outputs[0].token_ids == tokens
    assert len(set(tokens)) > 9


def test_stop_tokens_end_an_answer_but_not_before_min_tokens(text_model):
    with LLM(text_model, policy=Policy(4, 1), use_ray=False, dtype="float32") as llm:
        (free,) = llm.generate("Hello", SamplingParams(12, 0.0))
        tokens, text = free.outputs[0].token_ids, free.outputs[0].text
        end = tokens[4]
        first = tokens.index(end)
        several = [
            SamplingParams(12, 0.0, stop_token_ids=[end]),
            SamplingParams(12, 0.0, stop_token_ids=[end], min_tokens=8, ignore_eos=True),
            SamplingParams(12, 0.0, stop=text[2:4]),
            SamplingParams(12, 0.0, stop=text[2:4], min_tokens=4),
            SamplingParams(12, 0.0, stop=text[2:4], include_stop_str_in_output=True),
            SamplingParams(12, 0.0, stop_token_ids=[end], include_stop_str_in_output=True),
        ]
        outputs = llm.generate(["Hello"] * 6, several)
        stopped, masked, cut, late, kept, told = (it.outputs[0] for it in outputs)
        with pytest.raises(ValueError, match="token id 97 is outside the vocabulary of 97"):
            llm.request(0, "Hello", SamplingParams(stop_token_ids=[97]))
        everything = SamplingParams(stop_token_ids=[*range(97)], min_tokens=2)
        with pytest.raises(ValueError, match="min_tokens is 2, but .* all 97 of the vocabulary"):
            llm.request(0, "Hello", everything)
    assert stopped.token_ids == tokens[: first + 1]
    assert (stopped.text, stopped.finish_reason) == (text[:first], "stop")
    assert end not in masked.token_ids[:8] and len(masked.token_ids) >= 8
    assert (cut.finish_reason, cut.text) == ("stop", text[: text.index(text[2:4])])
    again = text.find(text[2:4], 3)
    assert late.text == (text if again < 0 else text[:again])
    assert kept.text == text[: text.index(text[2:4]) + 2] and told.text == text[: first + 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": -2}, {"top_k": 1.5}, {"min_p": 1.1}, {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")}, {"repetition_penalty": 0}, {"stop_token_ids": [-1]},
        {"stop_token_ids": 5}, {"min_tokens": 17}, {"min_tokens": True}, {"logit_bias": [5]},
        {"allowed_token_ids": []}, {"allowed_token_ids": [-1]}, {"bad_words": [[-1]]},
        {"bad_words": [""]}, {"bad_words": 5},
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_limits(wrong):
    ((name, _),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} is .*; it must be .*\d|{name} is .*list of"):
        SamplingParams(**wrong)


@pytest.mark.parametrize("bias", [{5: 101}, {5: float("nan")}, {-1: 5}, {"x": 5}, {5: "y"}])
def test_a_bias_beyond_its_limits_is_named(bias):
    with pytest.raises(ValueError, match="logit_bias has .* to -100 to 100"):
        SamplingParams(logit_bias=bias)
    assert SamplingParams(logit_bias={"7": 5}).logit_bias == {7: 5.0}
    assert SamplingParams(logit_bias={}) == SamplingParams(bad_words=[])


def test_special_tokens_are_part_of_the_text_if_they_are_asked_for(text_model, tmp_path):
    """Stop strings are looked for in the same text; here each answer is made of special tokens."""
    folder = shutil.copytree(text_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["A", "B"]})
    tokenizer.save_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(it) for it in "AB"]
    only = {"allowed_token_ids": [*ids, ord("c") - 30], "seed": 1}
    with LLM(folder, policy=Policy(2, 1), use_ray=False, dtype="float32") as llm:
        skipped, shown, stopped = llm.generate(
            ["Hello"] * 3,
            [
                SamplingParams(12, **only),
                SamplingParams(12, **only, skip_special_tokens=False),
                SamplingParams(12, **only, skip_special_tokens=False, stop="B"),
            ],
        )
    tokens = shown.outputs[0].token_ids
    whole = "".join({ids[0]: "A", ids[1]: "B"}.get(token, "c") for token in tokens)
    assert skipped.outputs[0].token_ids == tokens and {*whole} == {*"ABc"}
    assert shown.outputs[0].text == whole
    assert skipped.outputs[0].text == whole.replace("A", "").replace("B", "")
    assert stopped.outputs[0].text == whole[: whole.index("B")]
    assert stopped.outputs[0].finish_reason == "stop"
