"""Sparse attention by the whole engine: the tokens don't depend on where or how it happens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from copies import Copies
from engine_runs import generate, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import UNIT, placements, sparse, with_sparsity

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.schedule.ops import OPS, Lane, OpKind

HALF = Placement(0.5, 0.5, 0.0)
ELSEWHERE = (
    Policy(3, 2, 64, cache=Placement(0, 1, 0)),
    Policy(4, 2, 64, cache=Placement(0, 1, 0), cpu_attention=0.0),
    Policy(2, 4, 64, HALF, Placement(0.3, 0.7, 0), HALF, 0.5),
)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("policy", ELSEWHERE, ids=["host", "streamed", "all"])
@pytest.mark.parametrize("name", ["opt", "qwen2"])
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


@pytest.mark.parametrize("policy", ELSEWHERE, ids=["host", "streamed", "all"])
def test_sparse_attention_does_not_depend_on_how_prompts_are_cut(tiny_models, policy):
    """Prompts that end with a chunk of one token, too, are attended densely."""
    folder, _ = tiny_models["llama"]
    prompts = [prompt[:33] for prompt in tiny.prompts(20, 60, seed=1) if len(prompt) >= 33]
    prompts = prompts[:7]
    assert len(prompts) == 7
    whole = replace(policy, attention_sparsity=0.1)
    # A pass takes eight tiles of tokens: 33 make four passes and one token more.
    cut = replace(whole, gpu_batch_size=1, num_gpu_batches=2, max_batch_tokens=1)
    wanted = greedy(folder, prompts, whole, use_ray=False)
    found = greedy(folder, prompts, cut, use_ray=False)
    same = [a.token_ids == b.token_ids for a, b in zip(found, wanted, strict=True)]
    assert sum(same) >= len(prompts) - 1


@settings(max_examples=4)
@given(policy=sparse, name=st.sampled_from(["llama", "qwen2"]))
def test_async_equals_serial_bit_for_bit(tiny_models, name, policy, monkeypatch):
    folder, known = tiny_models[name]
    prompts = [reference.prompt for reference in known]
    tokens, logits = generate(folder, prompts, policy, "serial", monkeypatch)
    async_tokens, async_logits = generate(folder, prompts, policy, "async", monkeypatch)
    assert async_tokens == tokens
    assert all(torch.equal(a, b) for a, b in zip(async_logits, logits, strict=True))


def counted(folder, prompts, policy, monkeypatch, max_tokens: int = 5):
    """{(kind, visit): bytes that crossed to the device}, and how many the cost model says."""
    with monkeypatch.context() as patch:
        copies = Copies(patch)
        options = {"executor": "serial", "use_ray": False, "dtype": "float32", "device": "cpu"}
        with LLM(folder, policy=policy, hardware=UNIT, **options) as llm:
            llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
            modelled = llm.report.stages[0].measured.modelled_resources
    loading = (Lane.LOAD_CACHE, Lane.LOAD_SMALL)
    moved = {it: count for it, count in copies.moved.items() if OPS[it[0]].lane.worker in loading}
    return Counter(moved), modelled.get("h2d", 0)


@settings(max_examples=6)
@given(
    cache=placements(),
    share=st.sampled_from([0.0, 0.5]),
    bits=st.sampled_from([None, 4]),
    sparsity=st.sampled_from([0.1, 0.3, 1.0]),
    max_batch_tokens=st.sampled_from([1, 3, 64]),
    name=st.sampled_from(["llama", "qwen2"]),
)
def test_modelled_link_bytes_are_those_that_cross(
    tiny_models, cache, share, bits, sparsity, max_batch_tokens, name, monkeypatch
):
    folder, known = tiny_models[name]
    policy = Policy(3, 2, max_batch_tokens, cache=cache, cpu_attention=share, cache_bits=bits)
    policy = with_sparsity(policy, sparsity)
    prompts = [reference.prompt for reference in known]
    moved, modelled = counted(folder, prompts, policy, monkeypatch)
    assert modelled == pytest.approx(moved.total())


@pytest.mark.parametrize("bits", [None, 4])
def test_keys_and_the_values_kept_cross_the_link(tiny_models, bits, monkeypatch):
    """The values of 10 of 99 past tokens and a new one, instead of seven pages."""
    folder, _ = tiny_models["llama"]
    dense = Policy(4, 1, 64, cache=Placement(0, 1, 0), cpu_attention=0.0, cache_bits=bits)
    prompts = [[4 + i, *range(5, 90), *range(4, 17)] for i in range(4)]  # that share nothing
    assert all(len(prompt) == 99 for prompt in prompts)
    moved = {
        share: counted(
            folder, prompts, replace(dense, attention_sparsity=share), monkeypatch, max_tokens=2
        )[0]
        for share in (1.0, 0.1)
    }
    whole = moved[1.0][OpKind.LOAD_CACHE, 1]
    assert whole > 0 and moved[1.0][OpKind.LOAD_VALUES, 1] == 0
    assert moved[0.1][OpKind.LOAD_CACHE, 1] == whole / 2
    assert moved[0.1][OpKind.LOAD_VALUES, 1] == pytest.approx(whole / 2 * 10 / 112)
