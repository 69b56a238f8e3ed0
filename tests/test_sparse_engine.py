"""Sparse attention by the whole engine: the tokens don't depend on where or how it happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from test_exactness import greedy

from flexgen_ray import Placement, Policy

HALF = Placement(0.5, 0.5, 0.0)
ELSEWHERE = (
    Policy(3, 2, 64, cache=Placement(0, 1, 0)),
    Policy(4, 2, 64, cache=Placement(0, 1, 0), cpu_attention=0.0),
    Policy(2, 4, 64, HALF, Placement(0.3, 0.3, 0.4), HALF, 0.5),
)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("policy", ELSEWHERE, ids=["host", "streamed", "three tiers"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_sparse_attention_keeps_the_same_tokens_wherever_it_happens(
    tiny_models, name, policy, bits
):
    """But for a sequence in which two tokens weigh alike, and sums differ in their last bits."""
    folder, known = tiny_models[name]
    prompts = [reference.prompt for reference in known]
    sparse = {"cache_bits": bits, "attention_sparsity": 0.2}
    wanted = greedy(folder, prompts, Policy(7, 1, 64, **sparse), use_ray=False)
    found = greedy(folder, prompts, replace(policy, **sparse), use_ray=False)
    same = [a.token_ids == b.token_ids for a, b in zip(found, wanted, strict=True)]
    assert sum(same) >= len(prompts) - 1
    dense = greedy(folder, prompts, replace(policy, cache_bits=bits), use_ray=False)
    assert [it.token_ids for it in found] != [it.token_ids for it in dense]


@pytest.mark.parametrize("policy", ELSEWHERE, ids=["host", "streamed", "three tiers"])
def test_sparse_attention_does_not_depend_on_how_prompts_are_cut(tiny_models, policy):
    """Prompts that end with a chunk of one token, too, are attended densely."""
    folder, _ = tiny_models["llama"]
    prompts = [prompt[:33] for prompt in tiny.prompts(20, 60, seed=1) if len(prompt) >= 33]
    assert len(prompts) >= 7
    whole = replace(policy, attention_sparsity=0.1)
    # A pass takes eight tiles of tokens: 33 make four passes and one token more.
    cut = replace(whole, gpu_batch_size=1, num_gpu_batches=2, max_batch_tokens=1)
    wanted = greedy(folder, prompts, whole, use_ray=False)
    found = greedy(folder, prompts, cut, use_ray=False)
    same = [a.token_ids == b.token_ids for a, b in zip(found, wanted, strict=True)]
    assert sum(same) >= len(prompts) - 1
