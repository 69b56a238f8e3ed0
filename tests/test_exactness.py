"""Greedy fp32 tokens equal transformers', whatever the policy: the contract of docs/design.md."""

from __future__ import annotations

import pytest
import tiny
import torch
from engine_runs import MAX_TOKENS, assert_same, greedy
from hypothesis import given, settings
from strategies import policies

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.runtime.worker import Worker


def test_the_models_say_diverse_things(tiny_models):
    for name, (_, references) in tiny_models.items():
        distinct = {token for reference in references for token in reference.tokens}
        assert len(distinct) >= 12, name
        assert sum(len(set(reference.tokens)) > 1 for reference in references) >= 5, name
        # If too many cases had to be discarded as too close to call, nothing would be proven.
        assert sum(reference.certain_len() for reference in references) >= 7 * MAX_TOKENS - 8, name


@pytest.mark.parametrize("name", tiny.CONFIGS)
@settings(max_examples=4)
@given(policy=policies)
def test_every_policy_generates_the_same_tokens_as_transformers(
    tiny_models, name, policy, monkeypatch
):
    """From logits that are transformers' as well."""
    folder, references = tiny_models[name]
    seen: dict[int, list[torch.Tensor]] = {}

    def collect(indices, logits):
        for index, row in zip(indices, logits, strict=True):
            seen.setdefault(index, []).append(row.clone())

    run = Worker.run
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", lambda self: run(self, collect))
        prompts = [reference.prompt for reference in references]
        assert_same(greedy(folder, prompts, policy, use_ray=False), references)
    for index, reference in enumerate(references):
        for step in range(reference.certain_len()):
            wanted, got = reference.logits[step], seen[index][step]
            spread = (wanted.max() - wanted.min()).item()
            assert (wanted - got).abs().max().item() <= 1e-4 * spread


def test_last_rows_may_join_a_batch_that_had_none_on_their_tier(tiny_models):
    folder, references = tiny_models["llama"]
    policy = Policy(2, 3, 2, cache=Placement(0.1, 0.8, 0.1), cpu_attention=0.3)
    prompts = [reference.prompt for reference in references]
    assert_same(greedy(folder, prompts, policy, use_ray=False), references)


@pytest.mark.parametrize("name", [pytest.param("opt", marks=pytest.mark.slow), "llama"])
def test_a_ray_actor_generates_the_same_tokens(tiny_models, local_ray, name):
    folder, references = tiny_models[name]
    third = Placement(0.3, 0.3, 0.4)
    policy = Policy(3, 2, 8, weights=third, cache=third, activations=third, cpu_attention=0.5)
    prompts = [reference.prompt for reference in references]
    assert_same(greedy(folder, prompts, policy, use_ray=True), references)


def test_the_default_policy_generates_the_same_tokens(tiny_models):
    for folder, references in tiny_models.values():
        prompts = [reference.prompt for reference in references]
        small = {"gpu_memory": "400KiB", "cpu_memory": "400KiB", "disk_memory": "1MiB"}
        assert_same(greedy(folder, prompts, None, use_ray=False, **small), references)
        assert_same(greedy(folder, prompts, None, use_ray=False), references)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_sharded_checkpoints_are_read_like_whole_ones(tmp_path, tiny_models, name):
    _, references = tiny_models[name]
    folder = tiny.save(name, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    prompts = [reference.prompt for reference in references]
    assert_same(greedy(folder, prompts, Policy(4), use_ray=False), references)


def test_one_engine_serves_several_calls(tiny_models):
    folder, references = tiny_models["llama"]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    with LLM(folder, policy=Policy(2, 2), use_ray=False, dtype="float32") as llm:
        for some in (references[:2], references, references[3:4]):
            outputs = llm.generate([reference.prompt for reference in some], params)
            assert_same([output.outputs[0] for output in outputs], some)


def test_a_sequence_ends_at_an_end_token_and_frees_its_slot(tiny_models):
    """Row by row, whichever token is declared to be the end."""
    folder, references = tiny_models["llama"]
    end = references[0].tokens[5]
    with LLM(folder, policy=Policy(4, 1), use_ray=False, dtype="float32") as llm:
        object.__setattr__(llm.config, "eos_token_ids", (end,))
        prompts = [reference.prompt for reference in references]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0))
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        assert_same([output.outputs[0] for output in llm.generate(prompts, params)], references)
    for output, reference in zip(outputs, references, strict=True):
        tokens = reference.tokens
        stops = end in tokens
        wanted = tokens[: tokens.index(end) + 1] if stops else tokens
        assert output.outputs[0].token_ids == wanted
        assert output.outputs[0].finish_reason == ("stop" if stops else "length")
