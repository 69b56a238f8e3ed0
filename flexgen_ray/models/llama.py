"""Llama 2 and 3, Mistral, Qwen 2 and 3, and their like: rotary positions, RMSNorm, gated MLP,
grouped queries. What tells them apart is in their config.json, and read here.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.model_config import ModelConfig, Rope
from flexgen_ray.models.layers import (
    ROPE_TYPES,
    Lookup,
    Weights,
    gated_mlp,
    linear,
    project_heads,
    rms_norm,
    rotate,
    token_logits,
)

WEIGHT_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q_proj": "model.layers.{}.self_attn.q_proj",
    "k_proj": "model.layers.{}.self_attn.k_proj",
    "v_proj": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "o_proj": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate_proj": "model.layers.{}.mlp.gate_proj",
    "up_proj": "model.layers.{}.mlp.up_proj",
    "down_proj": "model.layers.{}.mlp.down_proj",
}


def parse_config(hf: dict) -> ModelConfig:
    """From the keys of Hugging Face's LlamaConfig, MistralConfig, Qwen2Config or Qwen3Config, and
    of those of families beside this one as far as they are alike.

    ValueError names an unknown rope type.
    """
    kind = hf.get("model_type", "llama")
    bias = kind == "qwen2" or hf.get("attention_bias", False)
    hidden, heads, rope = hf["hidden_size"], hf["num_attention_heads"], parse_rope(hf)
    # Linear scaling stretches the context that max_position_embeddings names, as in vLLM.
    stretched = rope.factor if rope.type == "linear" else 1
    return ModelConfig(
        family="llama",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hidden // heads,
        intermediate_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_seq_len=int(hf["max_position_embeddings"] * stretched),
        embedding_size=hidden,
        dtype=hf["dtype"],
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        activation=hf.get("hidden_act", "silu"),
        norm_eps=hf["rms_norm_eps"],
        gated_mlp=True,
        attention_bias=bias,
        output_bias=bias and kind != "qwen2",
        qk_norm="heads" if kind == "qwen3" else None,
        mlp_bias=hf.get("mlp_bias", False),
        rope=rope,
        **_windows(hf, kind),
        eos_token_ids=hf["eos_token_ids"],
    )


def _windows(hf: dict, kind: str) -> dict:
    """Which layers attend within a window: all of Mistral's and Phi's, Qwen's from
    max_window_layers on."""
    window, count = hf.get("sliding_window"), hf["num_hidden_layers"]
    if kind in ("mistral", "phi3"):
        return {"sliding_window": window}
    if kind not in ("qwen2", "qwen3") or not window or not hf.get("use_sliding_window"):
        return {}
    kinds = hf.get("layer_types")
    if not kinds:
        full = min(hf.get("max_window_layers", 28), count)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (count - full)
    return windows_of(kinds, window)


def windows_of(layer_types: list[str], window: int | None) -> dict:
    """Fields of ModelConfig. ValueError names an unknown type of a layer, or a missing window."""
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if "sliding_attention" in layer_types and not window:
        raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    if unknown:
        raise ValueError(f"layer_types {sorted(unknown)} are not supported")
    full = [i for i, it in enumerate(layer_types, start=1) if it == "full_attention"]
    if len(full) == len(layer_types):
        return {}
    return {"sliding_window": window, "full_attention_layers": tuple(full)}


def parse_rope(hf: dict) -> Rope:
    """transformers 5 writes rope_parameters; before it rope_theta and rope_scaling."""
    parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope type {kind!r} is not supported; known are {', '.join(ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1
    if partial != 1:
        raise ValueError(f"partial_rotary_factor {partial} is not supported; only 1 is")
    return Rope(
        theta=parameters.get("rope_theta") or hf.get("rope_theta") or Rope.theta,
        type=kind,
        factor=parameters.get("factor", Rope.factor),
        low_freq_factor=parameters.get("low_freq_factor", Rope.low_freq_factor),
        high_freq_factor=parameters.get("high_freq_factor", Rope.high_freq_factor),
        original_max_seq_len=parameters.get(
            "original_max_position_embeddings", Rope.original_max_seq_len
        ),
    )


def embed(config: ModelConfig, lookup: Lookup, tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens: [tokens]; returns hidden states [tokens, hidden]."""
    return lookup("embed_tokens.weight", tokens)


def project(
    config: ModelConfig, weights: Weights, x: Tensor, positions: Tensor, layer: int
) -> tuple[Tensor, ...]:
    """x: [tokens, hidden]; returns q, k, v, each [tokens, heads or kv_heads, head_dim]."""
    assert config.rope is not None
    q, k, v = project_heads(config, weights, rms_norm(config, weights, "attention_norm", x))
    if config.qk_norm:
        q, k = rms_norm(config, weights, "q_norm", q), rms_norm(config, weights, "k_norm", k)
    q, k = rotate(config.rope, positions, q, k)
    return q, k, v


def finish(config: ModelConfig, weights: Weights, residual: Tensor, attention: Tensor) -> Tensor:
    """residual: [tokens, hidden]; attention: [tokens, q_size]; returns [tokens, hidden]."""
    x = residual + linear(weights, "o_proj", attention)
    x += gated_mlp(config, weights, rms_norm(config, weights, "mlp_norm", x))
    return x


def head(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """x: [rows, hidden]; returns float32 logits [rows, vocabulary]."""
    return token_logits(config, weights, rms_norm(config, weights, "final_norm", x))
