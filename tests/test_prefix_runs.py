"""Runs whose prompts share prefixes generate what they would without, wherever these lie."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import tiny
import torch
from engine_runs import WHOLE, assert_same, generate, greedy, sharing
from hypothesis import given, settings
from hypothesis import strategies as st
from late_streams import LateCuda, StreamWatch
from strategies import pipelines, policies, with_sparsity

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.request import Request
from flexgen_ray.runtime.prefixes import find_prefixes
from flexgen_ray.schedule.ops import ON_STREAMS


def tokens_of(*parts: tuple[str, int]) -> list[int]:
    """Tokens of a prompt's parts: (name, number of tokens); parts of one name are alike."""
    found = []
    for name, count in parts:
        rng = random.Random(name)
        found += [rng.randrange(4, 90) for _ in range(count)]
    return found


A, A1, A2, A1A = [("a", 32)], [("a", 32), ("a1", 16)], [("a", 32), ("a2", 16)], [
    ("a", 32), ("a1", 16), ("a1a", 16)]  # fmt: skip
# Prefixes within prefixes, prompts that end with one, equal ones, and some that share nothing.
PROMPTS = [
    tokens_of(*parts)
    for parts in (
        [*A1A, ("b", 5)], [*A1A, ("c", 1)], [*A1, ("d", 37)], [*A1A, ("e", 20)], [*A1, ("f", 3)],
        [*A2, ("g", 7)], [("h", 70)], [*A2, ("i", 16)], [*A, ("j", 2)], [("k", 40)], [("l", 9)],
        [*A2], [("h", 66)], [("k", 40)], [("m", 1)], [*A1, ("n", 16)],
    )
]  # fmt: skip
WINDOWS = {"llama": None, "mistral": 23, "gemma3": 17, "qwen2": 35, "gpt-oss": 21}  # over a page
TIERS = st.sampled_from(["gpu", "cpu"])
QUOTAS = st.sampled_from([1, 2, 3, 4, 6, 30])
FOLDED = st.sampled_from([1, 2, 3, 9])  # rows of a group from which on its prefix is attended apart
EXECUTORS = st.sampled_from(["serial", "async"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: (folder, references)} of a model without windows, and of others with long ones."""
    found = {}
    for name, window in WINDOWS.items():
        changes = {} if window is None else {"sliding_window": window}
        folder = tiny.save(name, tmp_path_factory.mktemp(name), **changes)
        some = PROMPTS if name == "llama" else PROMPTS[:9]
        found[name] = folder, tiny.references(folder, some, 12)
    return found


@settings(max_examples=8)
@given(
    name=st.sampled_from(sorted(WINDOWS)),
    policy=policies,
    tier=TIERS,
    quota=QUOTAS,
    executor=EXECUTORS,
    is_short=st.booleans(),
    folded=FOLDED,
    chosen=st.sets(st.sampled_from(range(len(PROMPTS))), min_size=4),
)
def test_tokens_are_those_of_transformers(
    models, name, policy, tier, quota, executor, is_short, folded, chosen
):
    folder, references = models[name]
    some = [references[index % len(references)] for index in sorted(chosen)]
    with sharing([tier], quota, is_short, folded) as computed:
        found = greedy(folder, [it.prompt for it in some], policy, executor=executor, use_ray=False)
    assert_same(found, some)
    numbers = [it.number for it in computed]
    if quota >= 30 and not is_short:
        assert len({*numbers}) == len(numbers)
    if len(some) > 10:
        assert numbers


@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_fifty_groups_in_a_block(models, tier):
    """Three levels, two rows of each group side by side; the same tokens as without sharing."""
    folder, _ = models["llama"]
    prompts = [
        tokens_of(("a", 32), (f"of five {group % 10}", 32), (f"group {group}", 32), (f"own {i}", 3))
        for i, group in enumerate(2 * [*range(50)])
    ]
    policy = Policy(50, 2, 512, cache=Placement(0, 1, 0))
    with sharing([tier], 30 * 50, False) as computed:
        found = greedy(folder, prompts, policy, use_ray=False)
    wanted = greedy(folder, prompts, policy, use_ray=False, enable_prefix_caching=False)
    assert [it.token_ids for it in found] == [it.token_ids for it in wanted]
    assert len(computed) == len({it.number for it in computed}) == 1 + 10 + 50


@settings(max_examples=3)
@given(
    name=st.sampled_from(["llama", "gemma3"]),
    pipeline=pipelines(3),
    tiers=st.lists(TIERS, min_size=3, max_size=3),
    quota=QUOTAS,
    executor=EXECUTORS,
    is_short=st.booleans(),
    folded=FOLDED,
)
def test_nor_do_they_depend_on_stages(
    models, name, pipeline, tiers, quota, executor, is_short, folded
):
    folder, references = models[name]
    options = {"pipeline_parallel_size": len(pipeline.layers), "executor": executor}
    with sharing(tiers, quota, is_short, folded) as computed:
        prompts = [it.prompt for it in references]
        found = greedy(folder, prompts, pipeline, use_ray=False, **options)
    assert_same(found, references)
    assert computed


# The second model's kernels for packed caches take half a minute to compile.
@pytest.mark.parametrize("name", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
@settings(max_examples=2)
@given(policy=policies, bits=st.sampled_from([4, 8]), tier=TIERS, quota=QUOTAS, folded=FOLDED)
def test_packed_caches_hold_packed_prefixes(models, name, policy, bits, tier, quota, folded):
    assert_as_whole(models[name], replace(policy, cache_bits=bits), tier, quota, folded)


@settings(max_examples=3)
@given(
    policy=policies,
    sparsity=st.sampled_from([0.2, 0.5]),
    name=st.sampled_from(["llama", "mistral"]),
    quota=QUOTAS,
)
def test_sparse_rows_choose_among_their_prefixes_and_their_own_tokens(
    models, policy, sparsity, name, quota
):
    assert_as_whole(models[name], with_sparsity(policy, sparsity), "gpu", quota, 2)


def assert_as_whole(model, policy, tier, quota, folded) -> None:
    """All but one answer at most are those to whole prompts."""
    folder, references = model
    prompts = [it.prompt for it in references]
    wanted = greedy(folder, prompts, policy, use_ray=False, **WHOLE)
    with sharing([tier], quota, folded=folded) as computed:
        found = greedy(folder, prompts, policy, use_ray=False)
    # Sums that differ in their last bits may choose another code (test_sparse_engine.py).
    same = [a.token_ids == b.token_ids for a, b in zip(found, wanted, strict=True)]
    assert sum(same) >= len(same) - 1 and computed


@settings(max_examples=2)
@given(policy=policies, tier=TIERS, quota=QUOTAS)
def test_samples_of_one_prompt_share_it(models, policy, tier, quota):
    folder, _ = models["llama"]
    params = [
        SamplingParams(6, 1.0, 0.9, seed=5, n=4),
        SamplingParams(5, 0.8, n=3, logprobs=2, repetition_penalty=1.3),
        SamplingParams(4, 1.2, n=1, min_p=0.1),
    ]

    def sampled(**options) -> list:
        with LLM(folder, policy=policy, dtype="float32", use_ray=False, **options) as llm:
            outputs = llm.generate([PROMPTS[2], PROMPTS[6], PROMPTS[4]], params)
        return [[answer.token_ids for answer in output.outputs] for output in outputs]

    wanted = sampled(**WHOLE)
    with sharing([tier], quota) as computed:
        assert sampled() == wanted
    assert computed


@settings(max_examples=2)
@given(policy=policies, tier=TIERS, in_decode=st.booleans())
def test_scores_are_those_of_whole_prompts(models, policy, tier, in_decode):
    """A prompt shares what comes before the first token that is scored."""
    folder, _ = models["llama"]
    firsts = [40, 64, 33, 65, 1, 17, 32, 49]

    def scores(**options) -> list:
        with LLM(folder, policy=policy, dtype="float32", use_ray=False, **options) as llm:
            requests = [
                llm.score_request(index, prompt, min(first, len(prompt) - 1), in_decode)
                for index, (first, prompt) in enumerate(zip(firsts, PROMPTS, strict=False))
            ]
            llm.prepare(requests)
            found = {it.index: it.scores for it in llm.stream(requests)}
        return [found[index] for index in range(len(requests))]

    wanted = scores(**WHOLE)
    with sharing([tier]) as computed:
        found = scores()
    assert computed
    for ours, those in zip(found, wanted, strict=True):
        assert len(ours) == len(those)
        assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(ours, those, strict=True))


@settings(max_examples=3)
@given(
    name=st.sampled_from(["llama", "gemma3"]), tier=TIERS, quota=QUOTAS, is_short=st.booleans(),
    policy=st.builds(with_sparsity, policies, st.sampled_from([0.3, 1.0])), folded=FOLDED,
)  # fmt: skip
def test_asynchronous_runs_equal_serial_ones_bit_for_bit(
    models, name, policy, tier, quota, is_short, folded, monkeypatch
):
    folder, references = models[name]
    prompts = [it.prompt for it in references]
    with sharing([tier], quota, is_short, folded) as computed:
        serial, of_serial = generate(folder, prompts, policy, "serial", monkeypatch)
        count = len(computed)
        tokens, logits = generate(folder, prompts, policy, "async", monkeypatch)
    assert tokens == serial and 0 < count == len(computed) / 2
    assert all(torch.equal(a, b) for a, b in zip(logits, of_serial, strict=True))


@settings(max_examples=2)
@given(
    policy=policies,
    tier=TIERS,
    quota=QUOTAS,
    executor=EXECUTORS,
    eager=st.sets(st.sampled_from(sorted(ON_STREAMS))),
    is_short=st.booleans(),
    folded=FOLDED,
)
def test_streams_may_be_early_or_late(
    models, policy, tier, quota, executor, eager, is_short, folded, monkeypatch
):
    folder, references = models["llama"]
    with sharing([tier], quota, is_short, folded) as computed, monkeypatch.context() as patch:
        LateCuda(eager=eager).install(patch)
        prompts = [it.prompt for it in references[:9]]
        found = greedy(folder, prompts, policy, use_ray=False, executor=executor)
    assert_same(found, references[:9])
    assert computed


@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_no_stream_uses_a_tensor_of_another(models, policy_of_all, tier, monkeypatch):
    folder, references = models["llama"]
    watch, policy = StreamWatch(), replace(policy_of_all, max_batch_tokens=4)
    with sharing([tier]) as computed, monkeypatch.context() as patch:
        LateCuda(watch=watch).install(patch)
        greedy(folder, [it.prompt for it in references[:5]], policy, use_ray=False)
    assert computed and not watch.faults


@pytest.mark.parametrize("stages", [1, 2])
def test_a_run_that_was_left_is_taken_up_by_another(models, stages):
    """With the tokens that it had, as stages that were lost are."""
    folder, references = models["llama"]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    policy = Policy(3, 2, 8, cache=Placement(0.5, 0.5, 0))
    options = {"dtype": "float32", "use_ray": False, "pipeline_parallel_size": stages}
    with sharing(["cpu", "gpu"], 5) as computed, LLM(folder, policy=policy, **options) as llm:
        requests = [llm.request(i, it.prompt, params) for i, it in enumerate(references)]
        llm.prepare(requests)
        stream = llm.stream(requests)
        next(stream)
        stream.close()
        assert computed
        requests = [
            replace(request, generated=reference.tokens[: index % 12])
            for index, (request, reference) in enumerate(zip(requests, references, strict=True))
        ]
        llm.prepare(requests)
        outputs = {it.index: it.outputs[0] for it in llm.stream(requests)}
    for index, reference in enumerate(references):
        certain = reference.certain_len()
        assert outputs[index].token_ids[:certain] == reference.tokens[:certain]
        assert len(outputs[index].token_ids) == 12


def test_the_prompts_of_these_runs_are_a_tree_of_three_levels():
    with sharing(["gpu"]):
        params = SamplingParams(12)
        shared = find_prefixes([Request(*each, params) for each in enumerate(PROMPTS)])
    assert sorted(len(it.chain) for it in shared.prefixes) == [1, 1, 1, 2, 2, 3]
