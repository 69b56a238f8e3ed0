"""Answers without max_tokens: they may fill the context, and are planned for by a stated guess."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from engine_runs import assert_same, greedy
from hypothesis import given
from hypothesis import strategies as st

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.config import PAGE_TOKENS, Workload
from flexgen_ray.kernels import attention
from flexgen_ray.layout import plan as layout_plan
from flexgen_ray.layout.admission import mean_cached
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import workspace_bytes
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.choose import planned_job
from flexgen_ray.processor import generation_request
from flexgen_ray.request import EXPECTED_TOKENS, Request
from flexgen_ray.schedule.zigzag import StageLayers

CONFIG = shape_config("llama-3-8b")
OPEN = SamplingParams(max_tokens=None)
limits = st.none() | st.integers(1, 5000)


def request(prompt_len: int, most: int | None, context: int) -> Request:
    return generation_request(0, [5] * prompt_len, SamplingParams(most), CONFIG, context)


@given(st.integers(1, 3000), limits, st.integers(3001, 9000))
def test_what_is_expected_is_max_tokens_or_the_guess_and_never_beyond_the_context(
    prompt_len, most, context
):
    made, left = request(prompt_len, most, context), context - prompt_len
    assert made.max_tokens == min(left, left if most is None else most)
    assert made.expected_tokens == min(left, EXPECTED_TOKENS if most is None else most)
    assert (made.limit == "context") == (most is None or most > left)


@given(st.lists(st.tuples(st.integers(1, 900), limits), min_size=1, max_size=9))
def test_a_job_is_planned_by_expected_lengths_with_room_for_the_longest(lines):
    requests = [request(prompt, most, 8000) for prompt, most in lines]
    expected = [request(prompt, most or EXPECTED_TOKENS, 8000) for prompt, most in lines]
    job, guessed = planned_job(requests), planned_job(expected)
    assert job.max_seq_len == max(it.max_seq_len for it in requests)
    assert replace(job, max_tokens=guessed.max_tokens) == guessed


def plan_of(params: SamplingParams, count: int = 300, **options) -> StagePlan:
    """The plan of some prompts of 100 tokens by filling the tiers of a machine without rates."""
    options = {"gpu_memory": "2GiB", "cpu_memory": "3GiB", "use_ray": False} | options
    with LLM("opt-1.3b", load_format="dummy", dry_run=True, device="cpu", **options) as llm:
        prompts = ([5 + i, *[5] * 99] for i in range(count))  # that share nothing
        llm.prepare([llm.request(i, prompt, params) for i, prompt in enumerate(prompts)])
        return llm.plans[0]


def test_the_block_is_that_of_answers_of_the_expected_length():
    whole, guessed = plan_of(OPEN), plan_of(SamplingParams(EXPECTED_TOKENS))
    assert whole.max_seq_len == 2048 and guessed.max_seq_len == 100 + EXPECTED_TOKENS
    assert whole.workload.mean_len == guessed.workload.mean_len
    assert whole.workload.mean_len == mean_cached([(100, EXPECTED_TOKENS)])
    assert whole.policy.block_size == guessed.policy.block_size > 1


def test_where_one_answer_that_fills_the_context_does_not_fit_the_error_says_what_would():
    small = partial(plan_of, gpu_memory="900MiB", disk_memory="6GiB")
    said = "request 0 and 299 more have no max_tokens.*context of 2,048 tokens; set max_tokens"
    for policy in (None, Policy(2, 1, 128, Placement(0, 0, 1), Placement(0, 1, 0))):
        with pytest.raises(ValueError, match=f"budget is 900.*{said}.*{EXPECTED_TOKENS}"):
            small(OPEN, policy=policy)
        small(SamplingParams(EXPECTED_TOKENS), policy=policy)
    with pytest.raises(ValueError, match="budget is 1") as refused:
        small(OPEN, gpu_memory="1MiB")
    assert "max_tokens" not in str(refused.value)


def test_a_prompt_s_heads_and_queries_may_be_attended_few_at_a_time(tiny_models, monkeypatch):
    """As they are of rows so long that all together would take too much memory."""
    folder, references = tiny_models["llama"]
    prompts, policy = [reference.prompt for reference in references], Policy(4, 2, 16)
    monkeypatch.setattr(layout_plan, "ATTENTION_WORKSPACE", 1)
    prefill, calls = attention.prefill, []

    def counted(q, k, *others):
        calls.append((len(k), others[2]))
        return prefill(q, k, *others)

    monkeypatch.setattr(attention, "prefill", counted)
    assert_same(greedy(folder, prompts, policy, use_ray=False), references)
    assert set(calls) == {(1, PAGE_TOKENS)}


def test_memory_for_prompts_of_long_rows_is_that_of_few_heads():
    """In Llama 3 8B, 40 times the tokens take less than 25 times the memory."""
    layers = StageLayers.whole(CONFIG.num_layers)
    loads = (Workload(8, 100, tokens) for tokens in (3276, 131_072))
    plans = (StagePlan(CONFIG, layers, Policy(8, 1), load, "float16") for load in loads)
    short, long = map(workspace_bytes, plans)
    assert long < 25 * short
