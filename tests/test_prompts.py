"""Prompts, chats and sampling parameters: sorted out by type, answered in order, or named."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.engine.prompts import parse_prompt, several_chats, several_prompts

GREEDY = SamplingParams(max_tokens=3, temperature=0.0)
TEXTS = ["In the", "A new", "The end"]
HELLO, ASK = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "And you?"}]


@pytest.fixture(scope="module")
def llm(chat_model):
    with LLM(chat_model, policy=Policy(8), use_ray=False, dtype="float32", device="cpu") as llm:
        yield llm


def answers(outputs) -> list:
    return [(it.index, it.prompt_token_ids, it.outputs, it.error) for it in outputs]


def pandas_column(values):
    return pytest.importorskip("pandas").Series(values)


def arrow_column(values):
    return pytest.importorskip("pyarrow").chunked_array([values[:1], values[1:]])


ITERABLES = {
    "generator": lambda values: (value for value in values),
    "map": lambda values: map(str, values),
    "iterator": iter,
    "tuple": tuple,
    "deque": deque,
    "values of a dict": lambda values: dict(enumerate(values)).values(),
    "numpy": np.array,
    "numpy of objects": lambda values: np.array(values, dtype=object),
    "dicts": lambda values: [{"prompt": value} for value in values],
    "pandas": pandas_column,
    "pyarrow": arrow_column,
}


@pytest.mark.parametrize("form", ITERABLES)
def test_every_iterable_of_prompts_is_answered_in_order(llm, form):
    outputs = llm.generate(ITERABLES[form](TEXTS), GREEDY)
    assert answers(outputs) == answers(llm.generate(TEXTS, GREEDY))
    assert [output.prompt for output in outputs] == TEXTS
    assert [type(output.prompt) for output in outputs] == [str] * 3


IDS = [[40, 41, 42], [50, 51, 52]]
SINGLE = {
    "list": list,
    "tuple": tuple,
    "numpy": np.array,
    "numpy of small integers": lambda ids: np.array(ids, dtype=np.uint8),
    "numpy's integers": lambda ids: [np.int64(token) for token in ids],
    "tensor": torch.tensor,
    "dict": lambda ids: {"prompt_token_ids": ids},
    "dict with a tensor": lambda ids: {"prompt_token_ids": torch.tensor(ids)},
}


@pytest.mark.parametrize("form", SINGLE)
def test_a_sequence_of_integers_is_one_prompt_for_generate_and_scoring(llm, form):
    wanted = llm.generate(IDS, GREEDY)
    assert answers(llm.generate(SINGLE[form](IDS[0]), GREEDY)) == answers(wanted[:1])
    assert answers(llm.generate(map(SINGLE[form], IDS), GREEDY)) == answers(wanted)
    assert llm.score_request(0, SINGLE[form](IDS[0]), 1) == llm.score_request(0, IDS[0], 1)
    assert all(
        type(it) is int for it in llm.request(0, SINGLE[form](IDS[0]), GREEDY).prompt_token_ids
    )


def test_rows_of_an_array_of_integers_are_prompts_and_a_text_is_one(llm):
    wanted = answers(llm.generate(IDS, GREEDY))
    assert answers(llm.generate(np.array(IDS), GREEDY)) == wanted
    assert answers(llm.generate(torch.tensor(IDS), GREEDY)) == wanted
    text = llm.generate("A new", GREEDY)
    assert answers(text) == answers(llm.generate({"prompt": "A new"}, GREEDY))
    (both,) = llm.generate({"prompt": "as I say", "prompt_token_ids": IDS[0]}, GREEDY)
    assert (both.prompt, both.prompt_token_ids) == ("as I say", IDS[0])
    assert llm.score_request(0, "A new", 1).prompt_token_ids == llm.tokenizer.encode("A new")[:-1]


Prompts = st.lists(st.text(max_size=5) | st.lists(st.integers(0, 96), min_size=1), max_size=5)


@settings(max_examples=30)
@given(Prompts)
def test_a_generator_holds_what_its_list_holds(prompts):
    from_generator = several_prompts(prompt for prompt in prompts)
    assert from_generator == several_prompts(prompts) == prompts
    parsed = [parse_prompt(prompt) for prompt in prompts]
    assert [it.text if it.token_ids is None else it.token_ids for it in parsed] == prompts


@pytest.mark.parametrize(
    "prompts, said",
    [
        (None, "prompts is None (NoneType); it must be an iterable"),
        (5, "prompts is 5 (int)"),
        (b"bytes", "prompts is b'bytes' (bytes)"),
        ({"one", "two"}, "prompts is a set, which has no order"),
        (np.array(5), "prompts is array(5) (ndarray)"),
        (["one", None], "prompts[1]: the prompt is None (NoneType); it must be a text"),
        (["one", b"two"], "prompts[1]: the prompt is b'two' (bytes)"),
        (["one", float("nan")], "prompts[1]: the prompt is nan (float)"),
        ((it for it in (5, 6)), "prompts[0]: the prompt is 5 (int)"),
        ([40, 41.0], "prompts[0]: token 1 of the prompt is 41.0 (float); token ids are integers"),
        ([1.5, 2.5], "token 0 of the prompt is 1.5"),
        (np.array([1.5, 2.5]), "token 0 of the prompt is 1.5"),
        ([40, True], "token 1 of the prompt is True (bool)"),
        (np.array([True]), "token 0 of the prompt is True"),
        (torch.tensor([1.0]), "token 0 of the prompt is 1.0"),
        ([40, "41"], "token 1 of the prompt is '41' (str)"),
        ([[40], [40, -1]], "prompts[1]: token 1 of the prompt is -1 (int)"),
        ([[40], [40, 97]], "prompts[1]: token id 97 is outside the vocabulary of 97"),
        ([[[40]]], "prompts[0]: token 0 of the prompt is [40] (list)"),
        (["one", []], "prompts[1]: the prompt is empty"),
        ({"text": "x"}, "prompts[0]: the prompt has the key 'text'"),
        ([{"prompt": 5}], "prompts[0]: the prompt's text is 5 (int)"),
        ([{"prompt_token_ids": "abc"}], "prompt_token_ids is 'abc' (str); it must be a list"),
        ([{}], "prompts[0]: the prompt is {} (dict)"),
        (["x", "y" * 200], "prompts[1]: the prompt has 200 tokens, but the model's context is 160"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_is_named_in_a_sentence(llm, prompts, said):
    with pytest.raises(ValueError) as refused:
        llm.generate(prompts, GREEDY)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_table_is_refused():
    table = pytest.importorskip("pandas").DataFrame({"prompt": TEXTS, "id": [1, 2, 3]})
    with pytest.raises(ValueError, match="a table; give one of its columns"):
        several_prompts(table)
    assert several_prompts(table["id"]) == [1, 2, 3]  # each of which is refused, by its index
    table = pytest.importorskip("pyarrow").table({"prompt": TEXTS})
    with pytest.raises(ValueError, match="a table; give one of its columns"):
        several_prompts(table)


def test_an_output_for_each_bad_prompt_if_asked_for(llm):
    prompts = ["In the", None, [], "y" * 200, {"prompt": "The end"}, [40, -5]]
    outputs = llm.generate(iter(prompts), GREEDY, errors="return")
    assert [output.index for output in outputs] == [0, 1, 2, 3, 4, 5]
    good = llm.generate(["In the", "The end"], GREEDY)
    assert [it.outputs for it in outputs if not it.error] == [it.outputs for it in good]
    assert "[3]: the prompt has 200 tokens" in outputs[3].error and outputs[3].prompt == "y" * 200
    assert [len(it.outputs) for it in outputs] == [1, 0, 0, 0, 1, 0]
    (alone,) = llm.generate([[97]], GREEDY, errors="return")
    assert "outside the vocabulary" in alone.error
    with pytest.raises(ValueError, match='errors is \'ignore\'; it must be "raise" or "return"'):
        llm.generate("x", GREEDY, errors="ignore")


@pytest.mark.parametrize("form", [iter, tuple, lambda chats: (chat for chat in chats)])
def test_every_iterable_of_chats_is_answered_in_order(llm, form):
    wanted = answers(llm.chat([HELLO, ASK], GREEDY))
    assert answers(llm.chat(form([HELLO, ASK]), GREEDY)) == wanted
    # Tables that were read from files hold a chat as an array of objects.
    rows = [np.array(HELLO, dtype=object), tuple(ASK)]
    assert answers(llm.chat(form(rows), GREEDY)) == wanted
    assert answers(llm.chat(tuple(HELLO), GREEDY)) == wanted[:1]


@pytest.mark.parametrize(
    "chats, said",
    [
        ("Hi", "messages is 'Hi' (str); it must be a list"),
        (HELLO[0], "it must be a list"),
        ([HELLO, "Hi"], "chats[1]: messages must be a list"),
        ([HELLO, [{"role": "user"}]], "chats[1]: messages[0] has "),
        (iter(HELLO), "chats[0]: messages must be a list"),
    ],
)
def test_a_wrong_chat_is_named_in_a_sentence(llm, chats, said):
    with pytest.raises(ValueError) as refused:
        llm.chat(chats, GREEDY)
    assert said in str(refused.value)
    if isinstance(chats, list):
        good, bad = llm.chat(chats, GREEDY, errors="return")
        assert good.outputs and not good.error and said in bad.error


def test_sampling_params_are_one_or_any_iterable_of_one_a_prompt(llm):
    each = [replace(GREEDY, max_tokens=length) for length in (1, 2, 3)]
    wanted = answers(llm.generate(TEXTS, each))
    assert [len(output.outputs[0].token_ids) for output in llm.generate(TEXTS, iter(each))] == [
        1,
        2,
        3,
    ]
    assert answers(llm.generate(iter(TEXTS), (it for it in each))) == wanted
    assert answers(llm.generate(TEXTS, np.array(each, dtype=object))) == wanted


def test_numbers_of_numpy_in_sampling_params_are_python_s():
    params = SamplingParams(np.int64(3), np.float32(0.5), n=np.int8(2), seed=np.uint16(7))
    assert params == SamplingParams(3, 0.5, n=2, seed=7)
    assert all(type(value) is not np.int64 for value in vars(params).values())


@pytest.mark.parametrize(
    "params, said",
    [
        ([GREEDY] * 2, "3 prompts but 2 sampling_params; match them"),
        ([GREEDY, None, GREEDY], "sampling_params[1] is None (NoneType)"),
        ({"max_tokens": 3}, "sampling_params is {'max_tokens': 3} (dict); make it SamplingParams"),
        (3, "sampling_params is 3 (int)"),
    ],
)
def test_wrong_sampling_params_are_named_in_a_sentence(llm, params, said):
    with pytest.raises(ValueError) as refused:
        llm.generate(TEXTS, params)
    assert said in str(refused.value)


def test_no_prompts_have_no_outputs(llm):
    for nothing in ([], (), iter([]), np.array([]), np.array([], dtype=np.int64)):
        assert llm.generate(nothing, GREEDY) == llm.chat(nothing, GREEDY) == []
    assert several_chats([]) == []
