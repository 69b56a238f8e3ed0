"""max_model_len: weights load once for calls of any length within it; longer ones are refused."""

from __future__ import annotations

import json

import pytest
import tiny
from engine_runs import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray import LLM, Policy, SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
LONGEST = 60
MEMORY = {"gpu_memory": "64MiB", "cpu_memory": "64MiB", "disk_memory": "64MiB"}


class Loads:
    """Counts how often an LLM loads its weights."""

    def __init__(self, llm: LLM) -> None:
        self.count, self._load = 0, llm.backend.load
        llm.backend.load = self

    def __call__(self, *arguments) -> None:
        self.count += 1
        self._load(*arguments)


def engine(folder, **options) -> LLM:
    return LLM(folder, dtype="float32", device="cpu", use_ray=False, **MEMORY, **options)


@pytest.mark.parametrize("policy", [None, Policy(4, 2, 16)])
def test_weights_load_once_for_calls_of_any_length_within_it(tiny_models, policy):
    folder, references = tiny_models["llama"]
    prompts = sorted((it.prompt for it in references), key=len)
    with engine(folder, policy=policy, max_model_len=LONGEST) as llm:
        loads = Loads(llm)
        for count in (7, 1, 5):
            for prompt in prompts:
                llm.generate([prompt] * count, GREEDY)
        # The longest that it allows: a prompt with its answer, and a text that is scored.
        long = llm.generate([[5] * (LONGEST - 1)], GREEDY)
        requests = [llm.score_request(0, [5] * (LONGEST + 1), 1)]
        llm.prepare(requests)
        assert len(list(llm.stream(requests))[0].scores) == LONGEST
        outputs = [
            output.outputs[0] for output in llm.generate([it.prompt for it in references], GREEDY)
        ]
        assert loads.count == 1
    assert_same(outputs, references)
    assert (len(long[0].outputs[0].token_ids), long[0].outputs[0].finish_reason) == (1, "length")
    with engine(folder, policy=policy) as llm:
        loads = Loads(llm)
        for prompt in prompts:
            llm.generate([prompt], GREEDY)
        assert loads.count > 1


def test_a_plan_that_more_requests_would_not_change_stays_loaded(tiny_models):
    folder, _ = tiny_models["llama"]
    with engine(folder, max_model_len=8, policy=None) as llm:
        loads = Loads(llm)
        for count in (4000, 5000):
            llm.prepare([llm.request(i, [5, 6], SamplingParams(1)) for i in range(count)])
        assert loads.count == 1


@settings(max_examples=20)
@given(st.integers(1, 159), st.integers(1, 40))
def test_answers_end_at_max_model_len_and_longer_prompts_are_refused(text_model, prompt_len, limit):
    llm = engine_of(text_model, limit)
    if prompt_len >= limit:
        said = f"max_model_len is {limit} tokens .the model's context is {tiny.CONTEXT}"
        with pytest.raises(
            ValueError, match=f"{prompt_len} tokens, but {said}.*shorten the prompt"
        ):
            llm.request(0, [5] * prompt_len, SamplingParams(200))
    else:
        assert llm.request(0, [5] * prompt_len, SamplingParams(200)).max_seq_len == limit
    if prompt_len > limit + 1:
        with pytest.raises(ValueError, match=f"max_model_len is {limit}.*give them in windows"):
            llm.score_request(0, [5] * prompt_len, 1)


def engine_of(folder, limit: int) -> LLM:
    with engine(folder, max_model_len=limit) as llm:
        return llm


def test_more_than_the_context_is_refused(text_model):
    with pytest.raises(
        ValueError, match="max_model_len is 161, but the model's context is 160 tok"
    ):
        engine(text_model, max_model_len=161)


def test_a_file_s_longer_prompts_get_error_rows_and_a_resumed_job_has_the_same_limit(
    text_model, run_here, tmp_path
):
    lines = [{"prompt": "x" * size, "max_tokens": 50, "temperature": 0} for size in (5, 30)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    job = ("generate", "--model", text_model, "--input", tmp_path / "in.jsonl", "--output",
           tmp_path / "out.jsonl", "--no-use-ray", "--max-model-len")  # fmt: skip
    assert run_here(*job, 20).returncode == 2
    rows = [json.loads(line)["response"] for line in (tmp_path / "out.jsonl").open()]
    answer, error = sorted(rows, key=lambda row: row["status_code"])
    assert answer["body"]["usage"]["total_tokens"] == 20
    assert "max_model_len is 20 tokens" in error["body"]["error"]["message"]
    refused = run_here(*job, 30)
    assert refused.returncode == 1 and "max_model_len" in refused.stderr
