"""Several answers to a request, chats' log-probabilities, and tokens drawn through the engine."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion
from transformers import AutoModelForCausalLM

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.batch.job import read_job, run_job
from flexgen_ray.batch.journal import Journal
from flexgen_ray.processor import Samples


@pytest.fixture(scope="module")
def llm(chat_model):
    with LLM(chat_model, policy=Policy(16, 2), use_ray=False, dtype="float32") as llm:
        yield llm


@pytest.mark.parametrize("seed", [None, 7])
def test_samples_are_drawn_apart_and_the_same_whatever_the_batch(llm, seed):
    params = [
        SamplingParams(8, 2.0, seed=seed, n=5),
        SamplingParams(8, 2.0, seed=3),
        SamplingParams(8, n=2),
    ]
    several, _, two = llm.generate(["Hello", "x", "y"], params)
    answers = [answer.token_ids for answer in several.outputs]
    assert [answer.index for answer in several.outputs] == [0, 1, 2, 3, 4]
    assert len({*map(tuple, answers)}) == 5 and len(two.outputs) == 2
    (fewer,) = llm.generate(["Hello"], SamplingParams(8, 2.0, seed=seed, n=3))
    assert [answer.token_ids for answer in fewer.outputs] == answers[:3]
    (one,) = llm.generate(["Hello"], SamplingParams(8, 2.0, seed=seed))
    assert one.outputs[0].token_ids == answers[0]


def test_several_answers_have_the_scores_of_one_prompt_that_is_scored_once(llm):
    params = SamplingParams(4, 2.0, n=3, logprobs=1, prompt_logprobs=2)
    for own in (params, replace(params, logprobs=None)):
        first, *others = Samples([llm.request(0, [40, 41, 42, 43], own)]).requests
        assert (first.scored_from, first.top) == (1, 2)
        assert {it.scored_from for it in others} == {None if own.logprobs is None else 4}
        (several,) = llm.generate([[40, 41, 42, 43]], own)
        (one,) = llm.generate([[40, 41, 42, 43]], replace(own, n=1))
        for those in zip(several.prompt_logprobs, one.prompt_logprobs, strict=True):
            ids, others = (list(it or ()) for it in those)
            assert ids == others
        assert several.prompt_logprobs[0] is None and len(several.prompt_logprobs) == 4
        assert several.outputs[0].token_ids == one.outputs[0].token_ids
        for answer in several.outputs:
            told = [*map(len, answer.logprobs or ())]
            assert told == [] if own.logprobs is None else set(told) <= {1, 2} and len(told) == 4


def test_choices_and_their_log_probabilities_in_openai_s_words(llm, tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    bodies = {
        "several": {"prompt": "Hello", "n": 3, "max_tokens": 4, "logprobs": 2},
        "chat": {"messages": chat, "max_completion_tokens": 4, "logprobs": True,
                 "top_logprobs": 3, "n": 2, "top_k": 50, "min_p": 0.01, "min_tokens": 2,
                 "repetition_penalty": 1.2, "stop_token_ids": [5], "stop": ["zq", "zk"]},
        "own": {"messages": chat, "max_tokens": 2, "logprobs": True},
        "plain": {"messages": chat, "max_tokens": 2, "logprobs": False},
    }  # fmt: skip
    lines = [json.dumps({"custom_id": name, "body": body}) for name, body in bodies.items()]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with Journal(tmp_path / "out.jsonl") as journal:
        run_job(llm, journal, read_job(tmp_path / "in.jsonl", journal, SamplingParams(), {}))
    rows = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    found = {row["custom_id"]: row["response"]["body"] for row in rows}
    several = Completion.model_validate(found["several"], strict=True)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.completion_tokens == 12
    assert all("".join(it.logprobs.tokens) == it.text for it in several.choices)
    two = ChatCompletion.model_validate(found["chat"], strict=True)
    assert [choice.index for choice in two.choices] == [0, 1]
    for choice in two.choices:
        content = choice.logprobs.content
        assert bytes(sum((it.bytes for it in content), [])).decode() == choice.message.content
        for it in content:
            told = [top.logprob for top in it.top_logprobs]
            assert len(told) == 3 and told == sorted(told, reverse=True) and it.logprob <= told[0]
    own = ChatCompletion.model_validate(found["own"], strict=True).choices[0].logprobs
    assert [it.top_logprobs for it in own.content] == [[], []]
    assert ChatCompletion.model_validate(found["plain"]).choices[0].logprobs is None


def test_tokens_drawn_through_the_engine_follow_the_model_s_distribution(llm):
    """Pearson's chi-square of 1024 seeds, at p = 0.001."""
    prompt, draws = [40, 41, 42], 1024
    model = AutoModelForCausalLM.from_pretrained(llm.model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    assert len(logits) == tiny.VOCABULARY
    expected = torch.softmax(logits / 2, dim=-1)
    expected = torch.where(expected < 0.01 * expected.max(), 0, expected)
    order = expected.argsort(descending=True)
    expected[order[10:]] = 0
    ordered = expected[order] / expected.sum()
    kept = 1 + int((ordered.cumsum(0) < 0.97).sum())
    wanted = {int(order[i]): float(ordered[i] / ordered[:kept].sum()) for i in range(kept)}
    params = SamplingParams(1, 2.0, 0.97, seed=0, top_k=10, min_p=0.01, n=128)
    outputs = llm.generate([prompt] * 8, [replace(params, seed=seed) for seed in range(8)])
    seen = Counter(answer.token_ids[0] for output in outputs for answer in output.outputs)
    assert seen.total() == draws and set(seen) <= set(wanted)
    square = sum((seen[token] - draws * p) ** 2 / (draws * p) for token, p in wanted.items())
    assert kept >= 3
    limit = {2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 8: 26.1, 9: 27.9}
    assert square < limit[kept - 1]
