"""Packed weights and caches give what the same rounding gives in transformers, however placed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache as memoized

import pytest
import tiny
import torch
from copies import Copies
from engine_runs import generate, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import policies
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.rounding import RoundingCache, round_weights
from flexgen_ray import LLM, Placement, Policy, SamplingParams
from flexgen_ray.cli.main import app
from flexgen_ray.kernels import pack_plain as plain
from flexgen_ray.kernels.pack import pack
from flexgen_ray.models.config_files import load_config
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.packing import packed_bytes
from flexgen_ray.schedule.ops import OpKind

FORMATS = ((4, None, None), (8, 4, None), (None, 8, None), (None, None, 4), (4, None, 4), (8, 8, 8))
# Each model has layers of 4 and of 8 bits, and a packed table and a packed cache.
CASES = [
    (name, FORMATS[number])
    for name, numbers in {
        "opt": (0, 1, 3, 5), "mistral": (2, 4, 5), "phi3": (0, 1, 4), "opt-350m-like": (1, 2, 3, 4),
    }.items()
    for number in numbers
]  # fmt: skip
# Of a key or value to where its code turns: float32 sums differ by so much. With 8 bits most
# sequences have some, but a code more or less moves logits little.
TOO_CLOSE = 3e-6
MOVED = {None: 1e-4, 4: 1e-4, 8: 0.02}
MAX_TOKENS = 12


def with_formats(policy: Policy, formats) -> Policy:
    weight_bits, embedding_bits, cache_bits = formats
    return replace(
        policy, weight_bits=weight_bits, embedding_bits=embedding_bits, cache_bits=cache_bits
    )


class RoundedCache(RoundingCache):
    """certain: how many tokens came before the first with a value too close to where its code
    turns."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.certain = 10**9

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        seen = self.get_seq_length(layer_idx)
        for x in (key_states, value_states):
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
            step = (high - low) / (2**self._bits - 1)
            off = ((x - low) / step.clamp(min=1e-9)).frac().sub(0.5).abs() * step
            if self._bits == 4 and (off < TOO_CLOSE).any():
                self.certain = min(self.certain, seen)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def packed_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """As it is packed, read in plain torch."""
    out = torch.empty_like(weight)
    plain.unpack(pack(weight.detach(), bits, least_squares=True), bits, out)
    return out


@memoized
def references(folder, formats):
    """What transformers says with matrices and caches rounded, and how much of it is certain."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    round_weights(model, folder, WeightFormat("float32", *formats[:2]), packed_weight)
    for prompt in tiny.prompts(7, 40):
        kept = RoundedCache(formats[2]) if formats[2] else DynamicCache()
        reference = tiny.generate(model, prompt, MAX_TOKENS, past_key_values=kept)
        certain = getattr(kept, "certain", 10**9)
        # A token depends on all before it.
        decided = reference.certain_len(MOVED[formats[2]])
        found.append((reference, min(decided, max(certain - len(prompt) + 1, 0))))
    return found


@pytest.mark.parametrize(("name", "formats"), CASES, ids=str)
@settings(max_examples=2)
@given(policy=policies)
def test_every_policy_generates_what_the_rounded_model_does(tiny_models, name, formats, policy):
    folder, _ = tiny_models[name]
    wanted = references(folder, formats)
    assert sum(certain for _, certain in wanted) >= 2 * MAX_TOKENS
    prompts = [reference.prompt for reference, _ in wanted]
    outputs = greedy(folder, prompts, with_formats(policy, formats), use_ray=False)
    for output, (reference, certain) in zip(outputs, wanted, strict=True):
        assert output.token_ids[:certain] == reference.tokens[:certain]
        assert len(output.token_ids) == MAX_TOKENS


@pytest.mark.parametrize("name", ["opt", "llama"])
@settings(max_examples=2)
@given(policy=policies, formats=st.sampled_from(FORMATS))
def test_async_equals_serial_bit_for_bit(tiny_models, name, policy, formats, monkeypatch):
    folder, known = tiny_models[name]
    prompts = [reference.prompt for reference in known]
    policy = with_formats(policy, formats)
    tokens, logits = generate(folder, prompts, policy, "serial", monkeypatch)
    async_tokens, async_logits = generate(folder, prompts, policy, "async", monkeypatch)
    assert async_tokens == tokens
    assert all(torch.equal(a, b) for a, b in zip(async_logits, logits, strict=True))


@pytest.mark.parametrize("name", ["opt", "llama"])
@settings(max_examples=2)
@given(policy=policies, formats=st.sampled_from(FORMATS))
def test_two_stages_generate_what_one_does(tiny_models, name, policy, formats):
    folder, known = tiny_models[name]
    prompts = [reference.prompt for reference in known]
    policy = with_formats(policy, formats)
    two = StagePolicies((replace(policy, blocks_in_flight=2),))
    one = greedy(folder, prompts, policy, use_ray=False)
    split = greedy(folder, prompts, two, use_ray=False, pipeline_parallel_size=2)
    if formats[2] is None:
        assert [it.token_ids for it in split] == [it.token_ids for it in one]
    # Blocks are composed otherwise, so sums differ in their last bits, and a code may turn.
    for found, wanted, (_, certain) in zip(split, one, references(folder, formats), strict=True):
        assert found.token_ids[:certain] == wanted.token_ids[:certain]


def test_four_bit_groups_are_3_55_times_smaller_than_float16():
    for size in (64, 128, 4096):
        assert 2 * size / packed_bytes(size, 4) == pytest.approx(3.555, rel=1e-3)


@pytest.mark.parametrize("name", ["weight_bits", "embedding_bits", "cache_bits"])
def test_other_bits_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} is 3; it must be one of 4, 8"):
        Policy(**{name: 3})


@pytest.mark.parametrize("formats", [(4, None, None), (8, 4, None)], ids=str)
@pytest.mark.parametrize("name", ["opt", "phi3", "opt-350m-like"])
def test_a_packed_checkpoint_generates_what_packing_while_loading_does(
    tiny_models, name, formats, tmp_path
):
    folder, known = tiny_models[name]
    packed, (weight_bits, embedding_bits, _) = tmp_path / "packed", formats
    command = [
        "quantize",
        "--model",
        folder,
        "--output",
        packed,
        "--weight-bits",
        weight_bits,
    ]
    if embedding_bits:
        command += ["--embedding-bits", embedding_bits]
    app(list(map(str, command)), standalone_mode=False)
    prompts = [reference.prompt for reference in known]
    third = Placement(0.3, 0.3, 0.4)
    policy = Policy(3, 2, 8, weights=third)
    wanted = greedy(folder, prompts, with_formats(policy, formats), use_ray=False)
    found = greedy(packed, prompts, policy, use_ray=False)
    assert [it.token_ids for it in found] == [it.token_ids for it in wanted]
    with pytest.raises(ValueError, match="quantized to other bits"):
        greedy(packed, prompts, Policy(weight_bits=12 - weight_bits), use_ray=False)
    with pytest.raises(ValueError, match="is quantized already; take the original checkpoint"):
        app(
            list(map(str, [*command[:2], packed, "--output", tmp_path / "b"])),
            standalone_mode=False,
        )


def test_what_packed_wrongly_leaves_nothing_behind(tiny_models, tmp_path):
    folder, _ = tiny_models["opt"]
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="truncated or damaged"):
        app(
            ["quantize", "--model", str(broken), "--output", str(tmp_path / "out")],
            standalone_mode=False,
        )
    assert not (tmp_path / "out").exists()


def test_weights_that_others_quantized_are_refused_by_name(tiny_models, tmp_path):
    folder, _ = tiny_models["opt"]
    path = tmp_path / "config.json"
    config = json.loads((folder / "config.json").read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="'gptq' are not supported.*--weight-bits 4"):
        load_config(tmp_path)


CROSSING = frozenset({OpKind.LOAD_WEIGHTS, OpKind.LOAD_CACHE, OpKind.STORE_CACHE})


def test_a_pass_moves_a_fraction_of_the_bytes(tmp_path, monkeypatch):
    """Counted where they are copied, against float16: 3.55 x fewer of what is packed."""
    folder = tiny.save(
        "llama", tmp_path, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, num_hidden_layers=2,
    )  # fmt: skip
    policy = Policy(4, 2, weights=Placement(0, 1, 0), cache=Placement(0, 1, 0), cpu_attention=0.0)
    moved = {}
    for bits in (None, 4):
        with monkeypatch.context() as patch:
            copies = Copies(patch)
            packed = replace(policy, weight_bits=bits, cache_bits=bits)
            options = {"executor": "serial", "use_ray": False, "dtype": "float16"}
            with LLM(folder, policy=packed, device="cpu", **options) as llm:
                llm.generate([[5] * 40] * 8, SamplingParams(max_tokens=5, temperature=0.0))
            moved[bits] = Counter[OpKind]()
            for (kind, visit), count in copies.moved.items():
                if kind in CROSSING and visit > 1:
                    moved[bits][kind] += count
    assert set(moved[None]) == CROSSING
    ratios = {kind: moved[None][kind] / moved[4][kind] for kind in CROSSING}
    assert ratios[OpKind.LOAD_CACHE] == pytest.approx(3.555, rel=1e-3)
    # Queries come along with what isn't packed, as large as keys here.
    assert ratios[OpKind.STORE_CACHE] == pytest.approx(1.5 * 3.555, rel=1e-3)
    assert ratios[OpKind.LOAD_WEIGHTS] > 3.4
    assert sum(moved[None].values()) / sum(moved[4].values()) >= 3.4
