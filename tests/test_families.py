"""The config.json of each family means what it means in transformers, or is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny

from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_files import load_config
from flexgen_ray.quant.formats import WeightFormat


def loaded(tiny_models, tmp_path, name: str, changes: dict, without: tuple[str, ...] = ()):
    """The config of a tiny model with some keys changed or left out."""
    keys = json.loads((tiny_models[name][0] / "config.json").read_text())
    keys = {key: value for key, value in keys.items() if key not in without} | changes
    (tmp_path / "config.json").write_text(json.dumps(keys))
    return load_config(tmp_path)


def windows(config: ModelConfig) -> list[int | None]:
    return [config.window(layer) for layer in range(1, config.num_layers + 1)]


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("mistral", {}, [6, 6]),
        ("mistral", {"sliding_window": None}, [None, None]),
        ("qwen2", {}, [None, 9]),
        ("qwen2", {"max_window_layers": 0}, [9, 9]),
        ("qwen2", {"max_window_layers": 28}, [None, None]),
        ("qwen2", {"use_sliding_window": False}, [None, None]),
        ("llama", {"sliding_window": 4}, [None, None, None]),
        ("phi3", {}, [30, 30]),
        ("gemma3", {}, [7, 7, 7]),
        ("gemma3", {"sliding_window_pattern": 2}, [7, None, 7]),
    ],
)
def test_windows_are_those_that_transformers_makes(tiny_models, tmp_path, name, changes, expected):
    """Of configs as they were published, which don't list their layers."""
    found = loaded(tiny_models, tmp_path, name, changes, without=("layer_types",))
    assert windows(found) == expected
    assert found.max_seq_len == tiny.CONTEXT


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types.*'chunked_attention'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not sup"),
        ("llama", {"partial_rotary_factor": 0.75}, "partial_rotary_factor 0.75"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("gemma3", {"sliding_window": None}, "there is no sliding_window"),
        ("llama", {"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tiny_models, tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        loaded(tiny_models, tmp_path, name, changes)


def test_gemma_means_the_same_in_the_keys_it_was_published_with(tiny_models, tmp_path):
    now = load_config(tiny_models["gemma"][0])
    assert now.tie_word_embeddings and now.activation == "gelu_pytorch_tanh"
    keys = {"hidden_act": "gelu"}
    assert loaded(tiny_models, tmp_path, "gemma", keys, ("tie_word_embeddings",)) == now
    keys = {
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_local_base_freq": 100.0,
    }
    old = loaded(tiny_models, tmp_path, "gemma3", keys, ("rope_parameters", "tie_word_embeddings"))
    assert old == load_config(tiny_models["gemma3"][0])


def test_rows_of_one_tensor_are_checked_as_a_whole(tiny_models):
    folder, _ = tiny_models["phi3"]
    config = load_config(folder)
    wrong = replace(config, intermediate_size=40)
    with pytest.raises(ValueError, match=r"gate_up_proj.weight has shape \[96, 32\].*\[80, 32\]"):
        Checkpoint(folder, wrong).check(1, wrong.tensors(1), WeightFormat("float32"))
    Checkpoint(folder, config).check(1, config.tensors(1), WeightFormat("float32"))
