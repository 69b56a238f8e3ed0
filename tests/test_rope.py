"""Rotary embeddings are those of transformers, whatever type a config.json names."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from engine_runs import MAX_TOKENS, assert_same, greedy
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flexgen_ray import Policy
from flexgen_ray.models import rotation
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_files import load_config

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 8, "pad_token_id": 0,
}  # fmt: skip


def read(folder, config, **changes) -> ModelConfig:
    """Our config of transformers'. changes: to its rope_parameters."""
    keys = json.loads(config.to_json_string())
    keys["architectures"] = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    keys["rope_parameters"] |= changes
    (folder / "config.json").write_text(json.dumps(keys))
    return load_config(folder)


def assert_equal(config, ours: ModelConfig, **length) -> None:
    theirs, scale = ROPE_INIT_FUNCTIONS[ours.rope.type](config, CPU, **length)
    assert torch.equal(rotation._frequencies(ours.rope, ours.head_dim, CPU), theirs)
    assert ours.rope.attention_factor == scale


factors = st.floats(1, 64) | st.sampled_from([1, 1.0, 4])
originals = st.integers(2, 9000) | st.sampled_from([4096, 8192])
optional = {
    "yarn": {
        "beta_fast": st.floats(8, 64), "beta_slow": st.floats(0.01, 8), "truncate": st.booleans(),
        "attention_factor": st.floats(0.1, 3), "mscale": st.sampled_from([0.0, 0.7, 1.0]),
        "mscale_all_dim": st.sampled_from([0.0, 0.7, 1.0]),
    },
    "llama3": {},
    "linear": {},
}  # fmt: skip
required = {
    "yarn": {"factor": factors, "original_max_position_embeddings": originals},
    "llama3": {
        "factor": factors, "original_max_position_embeddings": originals,
        "low_freq_factor": st.floats(0.5, 2), "high_freq_factor": st.floats(2.5, 8),
    },
    "linear": {"factor": factors},
}  # fmt: skip


@pytest.mark.parametrize("kind", required)
@settings(max_examples=25)
@given(data=st.data())
def test_frequencies_are_those_of_transformers(tmp_path, kind, data):
    head_dim = data.draw(st.sampled_from([2, 6, 16, 64, 128]))
    fields = data.draw(st.fixed_dictionaries(required[kind], optional=optional[kind]))
    fields |= {"rope_type": kind, "rope_theta": data.draw(st.floats(1.5, 1e7))}
    config = LlamaConfig(
        hidden_size=64,
        head_dim=head_dim,
        max_position_embeddings=9001,
        rope_parameters=fields,
        **SIZES,
    )
    ours = read(tmp_path, config)
    assert_equal(config, ours)
    if kind == "yarn":
        original = fields["original_max_position_embeddings"]
        assert ours.max_seq_len == int(original * fields["factor"])


@settings(max_examples=25)
@given(data=st.data())
def test_longrope_takes_the_factors_of_its_context(tmp_path, data):
    share = data.draw(st.sampled_from([0.25, 0.5, 1.0]))
    original, context = data.draw(originals), data.draw(st.integers(9001, 10**6))
    lists = st.lists(st.floats(0.5, 60), min_size=int(8 * share), max_size=int(8 * share))
    extra = {"factor": factors, "attention_factor": st.floats(0.1, 3)}
    needed = {"type": st.just("longrope"), "short_factor": lists, "long_factor": lists}
    fields = data.draw(st.fixed_dictionaries(needed, optional=extra))
    config = Phi3Config(
        hidden_size=32, max_position_embeddings=context, original_max_position_embeddings=original,
        rope_parameters=fields | {"partial_rotary_factor": share}, **SIZES,
    )  # fmt: skip
    ours = read(tmp_path, config)
    assert ours.max_seq_len == context
    for length in (original, original + 1):
        assert_equal(config, ours.within(length), seq_len=length)


@settings(max_examples=20)
@given(share=st.sampled_from([0.25, 0.5, 0.75, 1.0]), scale=st.sampled_from([1.0, 1.3]))
def test_only_a_share_of_each_head_is_rotated(share, scale):
    rope = rotation.Rope(100.0, share=share, attention_factor=scale)
    x, positions = torch.randn(5, 3, 16), torch.tensor([0, 1, 2, 40, 150])
    out = torch.empty_like(x)
    rotation.rotate(rotation.rotation(rope, positions, 16, torch.float32), x, out)
    size = int(16 * share)
    assert torch.equal(out[..., size:], x[..., size:])
    for pair in range(size // 2):
        turned = torch.polar(torch.tensor(scale), positions * 100 ** (-2 * pair / size))
        wanted = torch.complex(x[..., pair], x[..., pair + size // 2]) * turned[:, None]
        torch.testing.assert_close(out[..., pair], wanted.real, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[..., pair + size // 2], wanted.imag, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def long_phi(tmp_path_factory):
    """A Phi-3 whose original context is 20 tokens."""
    changes = {"original_max_position_embeddings": 20}
    return tiny.save("phi3", tmp_path_factory.mktemp("phi3"), **changes)


@pytest.mark.parametrize("is_long", [False, True])
def test_requests_on_one_side_of_the_original_context_are_exact(long_phi, is_long):
    lengths = range(21, 41) if is_long else range(1, 21 - MAX_TOKENS)
    prompts = [it for it in tiny.prompts(30, 40) if len(it) in lengths][:4]
    limit = None if is_long else 20
    notes = []
    references = tiny.references(long_phi, prompts, MAX_TOKENS)
    outputs = greedy(
        long_phi, prompts, Policy(2, 3), use_ray=False, max_model_len=limit,
        on_progress=lambda it: notes.append(it.note),
    )  # fmt: skip
    assert_same(outputs, references)
    found = [it for it in notes if it and "longrope" in it]
    assert len(found) == is_long and all("160 tokens; max_model_len 20" in it for it in found)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"factor": -1.0}, "factor is -1.0; it must be a number above 0: correct config.json"),
        ({"factor": "4"}, "factor is '4'; it must be a number"),
        ({"beta_fast": 1, "beta_slow": 2}, "beta_fast is 1 and beta_slow 2"),
        ({"truncate": "no"}, "truncate is 'no'; it must be true or false"),
        ({"attention_factor": math.inf}, "attention_factor is inf"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5; yarn needs one above 1"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings is 1; .* 2 or"),
        ({"rope_type": "longrope"}, "'short_factor' is missing"),
        ({"rope_type": "longrope", "short_factor": 3}, "short_factor is 3; it must be a list of 4"),
        (
            {"rope_type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 3},
            "long_factor is a list of 3; it must be a list of 4 numbers",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1, 1, 0, 1], "long_factor": [1] * 4},
            r"short_factor\[2\] is 0; it must be a number above 0",
        ),
        ({"rope_type": "llama3"}, "'low_freq_factor' is missing"),
        (
            {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4.0},
            "high_freq_factor is 4.0 and low_freq_factor 4",
        ),
    ],
)
def test_wrong_fields_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, tiny.CONFIGS["qwen2"], **changes)


def test_a_partial_rotation_must_be_of_pairs(tmp_path):
    with pytest.raises(ValueError, match="0.7, which rotates 5 of a head's 8 elements"):
        read(tmp_path, tiny.CONFIGS["phi3"], partial_rotary_factor=0.7)
