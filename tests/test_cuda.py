"""The same laws with a CUDA device as the gpu tier. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from test_exactness import MAX_TOKENS, assert_same, policies

from flexgen_ray import LLM, Policy, SamplingParams
from flexgen_ray.resources import CUDA_RESERVE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)


@pytest.mark.parametrize("name", ["opt", "llama"])
@settings(max_examples=30)
@given(policy=policies)
def test_every_policy_generates_the_same_tokens_as_transformers(tiny_models, name, policy):
    folder, references = tiny_models[name]
    prompts = [reference.prompt for reference in references]
    with LLM(folder, policy=policy, dtype="float32", device="cuda", use_ray=False) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, GREEDY)]
    assert_same(outputs, references)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(max_examples=10)
@given(policy=policies)
def test_half_precision_runs_under_every_policy(tiny_models, dtype, policy):
    folder, references = tiny_models["llama"]
    prompts = [reference.prompt for reference in references]
    with LLM(folder, policy=policy, dtype=dtype, device="cuda", use_ray=False) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, GREEDY)]
    agree = sum(o.token_ids[:1] == r.tokens[:1] for o, r in zip(outputs, references, strict=True))
    assert agree >= len(references) - 2


def test_the_allocator_never_holds_more_than_the_budget(tiny_models):
    folder, references = tiny_models["llama"]
    budget = 256 * 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    options = {"dtype": "float32", "device": "cuda", "use_ray": False, "gpu_memory": budget}
    with LLM(folder, policy=Policy(4, 2), **options) as llm:
        llm.generate([reference.prompt for reference in references], GREEDY)
        booked = sum(llm.report.used["gpu"].values())
    assert booked <= budget - CUDA_RESERVE
    assert torch.cuda.max_memory_reserved() <= budget
