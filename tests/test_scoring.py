"""Log-probabilities are those of transformers, however work is laid out, and free if unasked."""

from __future__ import annotations

import signal
from dataclasses import replace

import msgpack
import pytest
import tiny
import torch
from engine_runs import assert_same, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_killer import SLOW, Killer
from strategies import pipelines, policies
from transformers import AutoModelForCausalLM

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.config import Workload
from flexgen_ray.kernels.sampling import SamplingRow, score
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Row, Rows
from flexgen_ray.layout.sizes import scored_tokens_at_a_time, workspace_bytes
from flexgen_ray.models.config_files import load_config
from flexgen_ray.request import Request, Score
from flexgen_ray.runtime.messages import Header, SampledTokens
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.zigzag import StageLayers

NAMES = ["opt", "llama"]
COUNTS = [(3, None), (None, None), (0, 1), (None, 4), (2, 2), (20, 0), (1, None)]
TEXTS = [text for text in tiny.prompts(9, 40, seed=1) if len(text) > 1]


@pytest.fixture(scope="module")
def logprobs(tiny_models) -> dict[str, list[torch.Tensor]]:
    """{model: each text's log-softmax by transformers, [tokens, vocabulary]}."""
    found = {}
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(tiny_models[name][0], dtype=torch.float32)
        with torch.no_grad():
            logits = [model.eval()(torch.tensor([text])).logits[0] for text in TEXTS]
        found[name] = [row.float().log_softmax(-1) for row in logits]
    return found


def assert_scores(found: list[Score], wanted: torch.Tensor, text: list[int], first: int) -> None:
    """wanted[i]: of the token that follows token i."""
    assert len(found) == len(text) - first
    for position, it in enumerate(found, start=first):
        row = wanted[position - 1]
        own = row[text[position]]
        assert it.logprob == pytest.approx(own.item(), abs=1e-4)
        assert (row > own + 1e-4).sum() < it.rank <= 1 + (row >= own - 1e-4).sum()
        for token, logprob in it.top:
            assert logprob == pytest.approx(row[token].item(), abs=1e-4)


@pytest.mark.parametrize("executor", ["serial", "async"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=2)
@given(data=st.data())
def test_given_tokens_score_as_in_transformers(tiny_models, logprobs, name, executor, data):
    """In prefill, in decode, or from one into the other; under any policy, on any stages."""
    folder, _ = tiny_models[name]
    pipeline = data.draw(policies | pipelines(tiny.CONFIGS[name].num_hidden_layers))
    stages = 1 if isinstance(pipeline, Policy) else len(pipeline.layers)
    options = {"pipeline_parallel_size": stages, "executor": executor, "use_ray": False}
    with LLM(folder, policy=pipeline, dtype="float32", device="cpu", **options) as llm:
        requests = []
        for index, text in enumerate(TEXTS):
            first = data.draw(st.integers(1, len(text) - 1))
            cut = data.draw(st.integers(1, len(text) - 1))
            params = SamplingParams(max_tokens=len(text) - cut, temperature=0.0)
            requests.append(Request(index, text[:cut], params, text[cut:], first, 2))
        llm.prepare(requests)
        outputs = {output.index: output for output in llm.stream(requests)}
    for request, text, wanted in zip(requests, TEXTS, logprobs[name], strict=True):
        output = outputs[request.index]
        assert output.prompt_token_ids == text and output.outputs[0].token_ids == []
        assert_scores(output.scores, wanted, text, request.scored_from)
        assert all(len(it.top) == 2 for it in output.scores)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_scoring_changes_no_token_and_scores_each(tiny_models, policy_of_all, name, stages):
    folder, references = tiny_models[name]
    asks = [
        SamplingParams(12, 0.0, logprobs=top, prompt_logprobs=of_prompt)
        for top, of_prompt in COUNTS
    ]
    options = {"policy": policy_of_all, "use_ray": False, "pipeline_parallel_size": stages}
    with LLM(folder, dtype="float32", device="cpu", **options) as llm:
        outputs = llm.generate([reference.prompt for reference in references], asks)
    assert_same([output.outputs[0] for output in outputs], references)
    for output, reference, params in zip(outputs, references, asks, strict=True):
        (answer,) = output.outputs
        for told, top in ((answer.logprobs, params.logprobs),
                          (output.prompt_logprobs, params.prompt_logprobs)):  # fmt: skip
            assert (told is None) == (top is None)
        for told, token, logits in zip(
            answer.logprobs or [], answer.token_ids, reference.logits, strict=False
        ):
            own = told[token]
            assert len(told) == max(params.logprobs, 1) and own.rank == 1
            wanted = logits.log_softmax(-1)
            assert own.logprob == pytest.approx(wanted[token].item(), abs=1e-4)
            assert [it.rank for it in told.values()] == list(range(1, len(told) + 1))
        if output.prompt_logprobs is not None:
            assert len(output.prompt_logprobs) == len(reference.prompt)
            assert [it is None for it in output.prompt_logprobs].count(True) == 1
            for told, token in zip(output.prompt_logprobs[1:], reference.prompt[1:], strict=True):
                assert next(iter(told)) == token
                assert params.prompt_logprobs <= len(told) <= params.prompt_logprobs + 1
        if answer.logprobs is not None:
            every = sum(
                told[token].logprob
                for told, token in zip(answer.logprobs, answer.token_ids, strict=True)
            )
            assert answer.cumulative_logprob == pytest.approx(every)


def run_pass(batcher: Scheduler, tokens_so_far: list[int]) -> None:
    """A pass whose scores are the positions of what they are about."""
    rows = batcher.compose(0)
    told = []
    for row in rows.scored:
        at = [rows.positions[row.first + i] + 1 for i in range(len(row.token_ids))]
        assert [tokens_so_far[position] for position in at] == list(row.token_ids)
        told.append((row.slot, [Score(float(position), 1) for position in at]))
    slots = [row.slot for row in rows.sampled]
    draws = batcher.sampling_rows(0, slots)
    asked = zip(slots, draws, strict=True)
    last = [Score(float(len(tokens_so_far)), 1)]
    told += [(slot, last) for slot, draw in asked if draw.top is not None]
    batcher.accept(
        0, slots, [6 if it.forced_token is None else it.forced_token for it in draws], told
    )


@settings(max_examples=200)
@given(
    st.integers(1, 20), st.integers(1, 23), st.integers(1, 8),
    st.lists(st.sampled_from(["told", "lost", "half told"]), max_size=12),
)  # fmt: skip
def test_a_replayed_request_keeps_its_scores_and_gets_the_others(
    prompt_len, first, cell_tokens, fates
):
    """Of each pass all is told before the run is lost, nothing, or the token without its score."""
    prompt, given_tokens = list(range(100, 100 + prompt_len)), [7, 8, 9, 5]
    params, first = SamplingParams(6, 0.0), min(first, prompt_len + 3)
    request = Request(0, prompt, params, given_tokens, first)
    batcher = Scheduler(1, 1, cell_tokens, frozenset([7]))
    batcher.add([request])
    for fate in fates + ["told"] * 30:
        if batcher.is_done:
            break
        before = [*batcher.take_scored()]
        run_pass(batcher, prompt + request.generated)
        scored = before if fate == "half told" else [*before, *batcher.take_scored()]
        if fate != "lost":
            request.scores.extend(it for _, found in scored for it in found)
            request.generated.extend(token for _, token in batcher.take_accepted())
        if fate != "told" and len(request.generated) < 6:
            batcher = Scheduler(1, 1, cell_tokens, frozenset([7]))
            batcher.add([replace(request)])
    assert request.generated == [*given_tokens, 6, 6]
    (done,) = batcher.take_finished()
    assert [it.logprob for it in done.scores] == list(range(first, prompt_len + 6))


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.1, 0.4])
def test_killed_stages_cost_no_score(tiny_models, logprobs, local_ray, moment):
    """In prefill or in decode: what was told is kept, the rest is scored when it is replayed."""
    options = {"policy": Policy(2, 2, 4), "pipeline_parallel_size": 2} | SLOW
    with LLM(tiny_models["opt"][0], dtype="float32", **options) as llm:
        cuts = [len(text) // 2 if index % 2 else len(text) - 1 for index, text in enumerate(TEXTS)]
        requests = [
            Request(i, text[:cut], SamplingParams(len(text) - cut, 0.0), text[cut:], 1)
            for i, (text, cut) in enumerate(zip(TEXTS, cuts, strict=True))
            if cut
        ]
        llm.prepare(requests)
        killer = Killer(llm, [(moment, 1)], signal.SIGKILL)
        killer.start()
        try:
            outputs = {output.index: output for output in llm.stream(requests)}
        finally:
            killer.is_over.set()
            killer.join()
        assert [it.stages for it in llm.report.recoveries] == [[1]]
    for request in requests:
        text, wanted = TEXTS[request.index], logprobs["opt"][request.index]
        assert_scores(outputs[request.index].scores, wanted, text, 1)


def test_who_asks_for_nothing_pays_nothing(tiny_models, monkeypatch):
    """No score is computed, and messages are as long as if there were none."""
    row, draw = Row(0, 3, 2, 0, True, True), SamplingRow(0.0, 1.0, 0.0)
    plain = Header(0, 0, Rows((row,), (), 2), [draw], [5])
    assert set(msgpack.unpackb(plain.encode())) == {
        "visit", "batch", "is_last", "prefill_tokens", "rows", "sampled",
    }  # fmt: skip
    assert msgpack.unpackb(SampledTokens(0, 1, [7]).encode()) == {
        "visit": 0, "batch": 1, "token_ids": [7],
    }  # fmt: skip
    folder, references = tiny_models["llama"]
    monkeypatch.setattr("flexgen_ray.runtime.handlers.score", None)
    found = greedy(folder, [it.prompt for it in references], Policy(4), use_ray=False)
    assert_same(found, references)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_greedy_token_has_the_first_rank_even_among_equals(rows):
    logits = torch.tensor(rows, dtype=torch.float32)
    (tokens,) = [logits.argmax(-1)]
    assert [it.rank for it in score(logits, tokens, 0).tolist()] == [1] * len(rows)
    every = torch.arange(5)
    ranks = [it.rank for it in score(logits[:1].expand(5, 5), every, 0).tolist()]
    assert sorted(ranks) == [1, 2, 3, 4, 5]


@settings(max_examples=60)
@given(policy=policies, prompt=st.integers(1, 400), top=st.integers(0, 20))
def test_logits_of_scored_tokens_stay_within_the_workspace(tiny_models, policy, prompt, top):
    config = replace(load_config(tiny_models["llama"][0]), vocab_size=5000)
    stage = StageLayers.whole(config.num_layers)
    plan = StagePlan(config, stage, policy, Workload(8, prompt, prompt + 8), "float16")
    count = scored_tokens_at_a_time(plan, top)
    scores_of_a_pass = plan.cell_tokens * (16 + 12 * top)
    # One at a time needs no more than sampling a row does.
    assert count == 1 or 8 * 5000 * count + scores_of_a_pass <= workspace_bytes(plan)
    assert count >= 1


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 21, 1.5, True, "3"])
def test_counts_of_likeliest_tokens_have_a_limit(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*0 to 20"):
        SamplingParams(**{name: value})


def test_what_cannot_be_scored_is_refused_with_the_numbers(tiny_models):
    with LLM(tiny_models["opt"][0], use_ray=False) as llm:
        for text, first, complaint in [
            ([5] * 162, 1, "162 tokens .* context is 160 tokens"),
            ([5, 6], 0, "from 0 on .* of 2"),
            ([5, 6], 2, "from 2 on .* of 2"),
            ([5], 1, "from 1 on .* of 1"),
            ([5, 97], 1, "token id 97 is outside the vocabulary of 97"),
        ]:
            with pytest.raises(ValueError, match=complaint):
                llm.score_request(0, text, first)
        for in_decode in (False, True):
            longest = [llm.score_request(0, [5] * 161, 1, in_decode)]
            llm.prepare(longest)
            (output,) = llm.stream(longest)
            assert len(output.scores) == 160
