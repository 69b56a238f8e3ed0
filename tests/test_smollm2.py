"""A real model on real prompts, token for token with transformers. Takes minutes, hence slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.cli import demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
MAX_TOKENS = 64
MIXED = Placement(0.3, 0.3, 0.4)
POLICIES = {
    "default": None,
    "three tiers": Policy(8, 4, 256, MIXED, MIXED, MIXED, 0.5),
    "host attention": Policy(16, 2, 512, Placement(0, 1, 0), Placement(0, 1, 0)),
    "all on disk": Policy(5, 3, 64, Placement(0, 0, 1), Placement(0, 0, 1), Placement(0, 0, 1)),
}


@pytest.fixture(scope="module")
def model(user_cache) -> Path:
    return demo.prepare_model(Path(user_cache))


@pytest.fixture(scope="module")
def references(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = demo.chat_prompts(tokenizer, demo.load_prompts())
    assert len(texts) == 32
    return tiny.references(model, [tokenizer.encode(text) for text in texts], MAX_TOKENS)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("use_ray", [False, True], ids=["in-process", "ray"])
def test_smollm2_says_the_same_as_in_transformers(model, references, name, use_ray):
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(model, policy=POLICIES[name], dtype="float32", device="cpu", use_ray=use_ray) as llm:
        outputs = llm.generate([reference.prompt for reference in references], params)
    compared = 0
    for output, reference in zip(outputs, references, strict=True):
        certain = reference.certain_len()
        compared += certain
        assert output.outputs[0].token_ids[:certain] == reference.tokens[:certain]
    # Most positions must have been decided by more than rounding, or nothing is proven.
    assert compared >= 0.9 * 32 * MAX_TOKENS
