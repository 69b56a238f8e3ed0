"""Numbers that are not finite: the request that has them fails, and no other one is touched."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from attention_cases import Case
from engine_runs import MAX_TOKENS, WHOLE, sharing
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import pipelines, policies, with_sparsity
from transformers import AutoModelForCausalLM

from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.evaluation.run import run_requests
from flexgen_ray.files.json_text import to_json
from flexgen_ray.kernels import host_kernel
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.kernels.sampling import NOT_FINITE, SamplingRow, sample, score

POISONS = {1: "mlp.gate_proj", 2: "self_attn.k_proj", 3: "self_attn.v_proj"}  # by token
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)


def poisonous(name: str, folder):
    """A model in which three tokens, and no others, leave float32 in the first layer.

    Only such a token has anything in a place of its own among the hidden states, which a matrix
    multiplies by more than float32 holds; no layer writes there.
    """
    tiny.save(name, folder)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        for place, (token, where) in enumerate(POISONS.items()):
            if "embed_tokens" in key:
                tensor[:, place] = 0
                tensor[token] = torch.eye(len(tensor[0]))[place] * 10
            elif "o_proj" in key or "down_proj" in key:
                tensor[place] = 0
            elif f"layers.0.{where}.weight" in key or ("mlp" in where and "0.mlp.up_proj.w" in key):
                tensor[:, place] = 1e25 if "mlp" in where else 3e38
            elif "lm_head" in key:
                tensor[token] = 0
    for key in (it for it in tensors if "embed_tokens" in it):
        for place, token in enumerate(POISONS):
            assert tensors[key][:, place].nonzero().tolist() == [[token]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """{name: (folder, references of harmless prompts)}"""
    made = {}
    for name in ("mistral", "llama3-like"):
        folder = poisonous(name, tmp_path_factory.mktemp("poison"))
        made[name] = folder, tiny.references(folder, tiny.prompts(7, 40), MAX_TOKENS)
    return made


def generated(folder, prompts, policy, **options):
    with LLM(folder, policy=policy, dtype="float32", use_ray=False, **options) as llm:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            outputs = llm.generate(prompts, GREEDY)
    return outputs, [str(it.message) for it in seen if "not finite" in str(it.message)]


def with_poison(references, places):
    """Prompts with poisonous ones among them, and where those are."""
    prompts = [reference.prompt for reference in references]
    for place in sorted(places):
        longest = max(prompts, key=len)
        prompts.insert(place, [*longest[: 3 * place], place % 3 + 1, *longest[: 5 + place]])
    return prompts, [index for index, it in enumerate(prompts) if is_poisonous(it)]


def is_poisonous(prompt):
    return not POISONS.keys().isdisjoint(prompt)


def assert_only_they_fail(outputs, bad, references):
    assert [it.index for it in outputs if it.error] == bad
    for output in outputs:
        if output.error:
            assert not output.outputs and "not finite" in output.error
            assert "float32" in output.error and " at token " in output.error
    good = [it.outputs[0] for it in outputs if not it.error]
    for output, reference in zip(good, references, strict=True):
        certain = reference.certain_len()
        assert output.token_ids[:certain] == reference.tokens[:certain]


def test_transformers_has_no_finite_logits_for_the_poisons(poisoned):
    for folder, references in poisoned.values():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for last in (5, *POISONS):
            logits = model(torch.tensor([[*references[0].prompt, last]])).logits[0, -1]
            assert logits.isfinite().all() == (last == 5)


some_places = st.sets(st.integers(0, 6), min_size=1, max_size=3)


@pytest.mark.parametrize("name", ["mistral", "llama3-like"])
@settings(max_examples=3)
@given(policy=policies, executor=st.sampled_from(["serial", "async"]), places=some_places)
def test_a_request_that_fails_harms_no_other(poisoned, name, policy, executor, places):
    folder, references = poisoned[name]
    prompts, bad = with_poison(references, places)
    outputs, said = generated(folder, prompts, policy, executor=executor)
    assert_only_they_fail(outputs, bad, references)
    assert len(said) == 1 and said[0].startswith(f"{len(bad)} of {len(prompts)} requests failed")


@settings(max_examples=3)
@given(data=st.data(), executor=st.sampled_from(["serial", "async"]), places=some_places)
def test_a_request_that_fails_harms_no_other_in_several_stages(poisoned, data, executor, places):
    folder, references = poisoned["llama3-like"]
    pipeline = data.draw(pipelines(2))
    prompts, bad = with_poison(references, places)
    stages = {"pipeline_parallel_size": len(pipeline.layers), "executor": executor}
    outputs, _ = generated(folder, prompts, pipeline, **stages)
    assert_only_they_fail(outputs, bad, references)


@settings(max_examples=3)
@given(
    policy=policies,
    cache_bits=st.sampled_from([None, 4, 8]),
    sparsity=st.sampled_from([1.0, 0.2]),
    places=some_places,
)
def test_nor_with_packed_caches_and_sparse_attention(
    poisoned, policy, cache_bits, sparsity, places
):
    folder, references = poisoned["llama3-like"]
    prompts, bad = with_poison(references, places)
    policy = replace(with_sparsity(policy, sparsity), cache_bits=cache_bits)
    found, _ = generated(folder, prompts, policy)
    assert [it.index for it in found if it.error] == bad
    wanted, _ = generated(folder, [reference.prompt for reference in references], policy)
    pairs = zip([it for it in found if not it.error], wanted, strict=True)
    # Sums that differ in their last bits may choose another code or token (test_sparse_engine.py).
    same = [a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in pairs]
    assert sum(same) >= len(same) - 1


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_what_takes_the_slot_of_a_request_that_failed_is_whole(poisoned, tier, bits):
    """A prompt comes in pieces, so that its NaN are streamed; then a short one takes its slot,
    beside a row so long that the short one's attention is masked where the NaN were."""
    folder, references = poisoned["llama3-like"]
    long, short = max(references, key=lambda it: len(it.prompt)), references[0].prompt[:2]
    prompts = [long.prompt, [*long.prompt[:10], 1, *long.prompt[10:-6]], short]
    cache = Placement(**{"gpu": 0.0, "cpu": 0.0, "disk": 0.0} | {tier: 1.0})
    policy = Policy(2, 1, 1, cache=cache, cpu_attention=0.0, cache_bits=bits)
    outputs, _ = generated(folder, prompts, policy)
    assert [bool(it.error) for it in outputs] == [False, True, False]
    alone, _ = generated(folder, [long.prompt, short], policy)
    assert outputs[0].outputs[0].token_ids == alone[0].outputs[0].token_ids
    assert outputs[2].outputs[0].token_ids == alone[1].outputs[0].token_ids


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_prompt_fails_though_its_end_does_not_see_its_beginning(poisoned, share):
    """The window of six tokens has left the first one behind long before any token is chosen."""
    folder, references = poisoned["mistral"]
    policy = Policy(2, 1, 1, cache=Placement(0, 1, 0), cpu_attention=share)
    prompts = [[1, *references[0].prompt, *range(30, 60)], references[1].prompt]
    outputs, _ = generated(folder, prompts, policy)
    assert_only_they_fail(outputs, [0], references[1:2])


@pytest.mark.parametrize("name", ["mistral", "llama3-like"])
@settings(max_examples=2)
@given(
    policy=policies,
    tier=st.sampled_from(["gpu", "cpu"]),
    place=st.sampled_from([0, 20, 47, 50]),
    count=st.integers(1, 3),
    stages=st.integers(1, 2),
)
def test_a_prefix_that_is_not_finite_fails_all_that_share_it(
    poisoned, name, policy, tier, place, count, stages
):
    """A window leaves it behind; and its pages are whole when another prefix takes them."""
    folder, references = poisoned[name]
    common = [*range(10, 58)]
    bad = [*common[:place], 1, *common[place + 1 :]]
    prompts = [[*bad, *range(60, 70 + more)] for more in range(3)]
    prompts += [[*common, *range(60, 70 + more)] for more in range(3)]
    prompts[count:count] = [reference.prompt for reference in references]
    options = {"pipeline_parallel_size": stages}
    wanted, _ = generated(folder, prompts, policy, **options, **WHOLE)
    with sharing([tier], quota=3) as computed:
        outputs, _ = generated(folder, prompts, policy, **options)
    assert [it.error for it in outputs] == [it.error for it in wanted]
    assert sum(bool(it.error) for it in outputs) == 3 and computed
    assert_only_they_fail(
        [it for it in outputs if it.index in range(count, count + len(references))], [], references
    )


def test_a_token_of_an_answer_may_fail_too(poisoned):
    """Tokens that are given are fed one by one, as chosen ones are."""
    folder, references = poisoned["llama3-like"]
    texts = [reference.prompt + reference.tokens for reference in references]
    texts[2] = [*texts[2][:-3], 2, *texts[2][-3:]]
    with LLM(folder, policy=Policy(3, 2), dtype="float32", use_ray=False) as llm:
        found = {}
        for in_decode in (False, True):
            requests = [llm.score_request(i, it, 1, in_decode) for i, it in enumerate(texts)]
            llm.prepare(requests)
            found[in_decode] = {it.index: it for it in llm.stream(requests)}
    for outputs in found.values():
        assert [index for index in sorted(outputs) if outputs[index].error] == [2]
        assert not outputs[2].scores
    # A prompt's tokens are attended together, and masked ones times NaN are NaN.
    assert f"token {len(texts[2]) - 3}," in found[True][2].error
    for index in (0, 1, 3, 4, 5, 6):
        pairs = zip(*(found[it][index].scores for it in (False, True)), strict=True)
        assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in pairs)


@pytest.mark.parametrize(
    "params",
    [{"n": 3, "temperature": 1.0}, {"prompt_logprobs": 1}, {"max_tokens": 0, "prompt_logprobs": 0}],
)
def test_whatever_was_asked_for(poisoned, params):
    folder, references = poisoned["llama3-like"]
    prompts = [references[0].prompt, [5, 3, 7], references[1].prompt]
    asked = SamplingParams(**{"max_tokens": 4, "temperature": 0.0} | params)
    with LLM(folder, policy=Policy(2, 2), dtype="float32", use_ray=False) as llm:
        said = "1 of 3 requests failed; request 1: .*not finite"
        with pytest.warns(UserWarning, match=said) as warned:
            outputs = llm.generate(prompts, asked)
        assert warned[0].filename == __file__
    assert [bool(it.error) for it in outputs] == [False, True, False]
    assert [len(it.outputs) for it in outputs] == [asked.n, 0, asked.n]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_job_writes_an_error_row_that_names_the_dtype(poisoned, tmp_path, run_here, dtype):
    folder, references = poisoned["llama3-like"]
    lines = [
        {"custom_id": "bad", "prompt": [5, 1, 7], "max_tokens": 4, "logprobs": 2},
        {"custom_id": "good", "prompt": references[0].prompt, "max_tokens": 4, "logprobs": 2},
    ]
    # These are no numbers of float16: the weights are those that overflow only when multiplied.
    weights = load_file(folder / "model.safetensors")
    model = shutil.copytree(folder, tmp_path / "model")
    largest = 2e4 if dtype == "float16" else 1e25
    save_file(
        {k: v.clamp(-largest, largest) for k, v in weights.items()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ended = run_here(
        "generate", "--model", model, "--input", tmp_path / "in.jsonl", "--dtype", dtype,
        "--output", tmp_path / "out.jsonl", "--report", tmp_path / "report.json", "--no-use-ray",
    )  # fmt: skip
    assert ended.returncode == 2
    written = (tmp_path / "out.jsonl").read_text()
    rows = {row["custom_id"]: row["response"] for row in map(json.loads, written.splitlines())}
    assert rows["good"]["status_code"] == 200 and rows["bad"]["status_code"] == 500
    message = rows["bad"]["body"]["error"]["message"]
    assert f"not finite (NaN or infinite) in {dtype} at token 3," in message
    assert "--dtype float32" in message or "--dtype bfloat16 or float32" in message
    assert "NaN" not in re.sub(r"\(NaN or infinite\)", "", written)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


def test_an_evaluation_ends_with_the_reason(poisoned):
    folder, references = poisoned["llama3-like"]
    with LLM(folder, dtype="float32", use_ray=False) as llm:
        requests = [
            llm.score_request(0, references[0].prompt, 1),
            llm.score_request(1, [5, 3, 9], 1),
        ]
        with pytest.raises(ValueError, match="text 1 can.t be scored: .* not finite"):
            run_requests(llm, requests)


VALUES = [float("nan"), float("inf"), -float("inf")]


@settings(max_examples=25)
@given(data=st.data(), value=st.sampled_from(VALUES))
def test_a_row_whose_largest_logit_is_not_finite_gets_no_token(data, value):
    """Whichever way it is chosen; what can't be chosen, a logit of -inf, is no fault."""
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    places = data.draw(st.sets(st.integers(0, 29), min_size=1, max_size=29))
    logits[1, sorted(places)] = value
    draws = data.draw(
        st.lists(
            st.builds(
                SamplingRow,
                temperature=st.sampled_from([0.0, 1.0]),
                top_p=st.sampled_from([0.5, 1.0]),
                uniform_number=st.floats(0, 0.99),
                forced_token=st.sampled_from([None, 4]),
                top_k=st.sampled_from([0, 3]),
                min_p=st.sampled_from([0.0, 0.3]),
                banned=st.sampled_from([(), (2, 3)]),
            ),
            min_size=4,
            max_size=4,
        )
    )
    tokens = sample(logits, draws).tolist()
    fails = value != -float("inf")
    assert [token == NOT_FINITE for token in tokens] == [False, fails, False, False]
    scores = score(logits, torch.tensor(tokens).clamp(min=0), 3).tolist()
    assert [math.isnan(it.logprob) for it in scores] == [False, fails, False, False]
    logits[1] = -float("inf")
    assert sample(logits, draws).tolist() == [tokens[0], NOT_FINITE, *tokens[2:]]


KERNELS = {
    "sdpa": host_kernel.load_kernel("sdpa", 1),
    "numba": host_kernel.load_kernel("numba", 1),
}


@pytest.mark.parametrize("sparsity", [1.0, 0.3])
@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=20)
@given(
    value=st.sampled_from(VALUES[:2]),
    where=st.sampled_from(["q", "k"]),
    place=st.integers(0, 19),
    window=st.sampled_from([None, 25]),
    group=st.sampled_from([1, 4]),
)
def test_attention_hides_nothing_and_spreads_nothing(
    kernel, sparsity, value, where, place, window, group
):
    """A row with a query or key that isn't finite, and no other, has attention that isn't."""
    random = torch.Generator().manual_seed(place)
    q = torch.randn(3, 2 * group, 16, generator=random).abs()
    k, v = torch.randn(2, 3, 2, 40, 16, generator=random)
    lens = [30, 20, 40]
    case = Case(q, k, v, lens, window)
    wanted = case.run(KERNELS[kernel], sparsity)
    if where == "q":
        q[1, :, 3] = value
    else:
        k[1, :, place, 3] = value
    found = case.run(KERNELS[kernel], sparsity)
    assert found[1].isfinite().sum() == 0
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [*VALUES, 1e6])
def test_a_packed_group_tells_that_a_value_was_not_finite(bits, value):
    """Or beyond what packing holds; a cache must take it, a checkpoint's weights may not."""
    x = torch.randn(3, 130)
    x[1, 70] = value
    packed, found = pack(x, bits, raises=False), torch.empty_like(x)
    unpack(packed, bits, found)
    assert not found[1, 64:128].isfinite().any()
    found[1, 64:128] = 0
    assert found.isfinite().all()
    with pytest.raises(ValueError, match="can't be quantized"):
        pack(x, bits)


def test_no_json_of_ours_has_a_number_that_is_not_finite():
    value = {"a": [1.5, float("nan"), (float("inf"),)], "b": {"c": -float("inf")}, "d": "NaN"}
    wanted = {"a": [1.5, None, [None]], "b": {"c": None}, "d": "NaN"}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == wanted
    assert to_json({"x": 1}, indent=2) == json.dumps({"x": 1}, indent=2)
