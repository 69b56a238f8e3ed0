"""Llama 2 and 3, Mistral, Qwen 2 and 3, and their like: rotary positions, RMSNorm, gated MLP,
grouped queries. What tells them apart is in their config.json, and read here.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.layers import (
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
