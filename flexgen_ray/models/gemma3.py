"""Gemma 3 (Gemma Team 2025), text only: Gemma, with more norms and sliding windows.

Norms come before and after attention and MLP, and queries and keys are normed head by head. Most
layers attend within a sliding window, and have a rotary embedding of their own.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.models import gemma
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.layers import (
    Weights,
    gated_mlp,
    linear,
    norm_heads,
    project_heads,
    rms_norm,
    rotate,
)

WEIGHT_NAMES = gemma.WEIGHT_NAMES | {
    "attention_post_norm": "model.layers.{}.post_attention_layernorm",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
embed, head = gemma.embed, gemma.head


def project(
    config: ModelConfig, weights: Weights, x: Tensor, positions: Tensor, layer: int
) -> tuple[Tensor, ...]:
    """Norm and project hidden states, norm queries and keys, and rotate them by the layer's kind.

    x: [tokens, hidden]. Returns q, k, v, each [tokens, heads or kv_heads, head_dim].
    """
    rope = config.rope if config.window(layer) is None else config.window_rope
    assert rope is not None
    q, k, v = project_heads(config, weights, rms_norm(config, weights, "attention_norm", x))
    q, k = rotate(rope, positions, *norm_heads(config, weights, q, k))
    return q * config.query_scale, k, v


def finish(config: ModelConfig, weights: Weights, residual: Tensor, attention: Tensor) -> Tensor:
    """Complete a decoder layer after attention; outputs of attention and MLP are normed.

    residual: [tokens, hidden]; attention: [tokens, q_size]. Returns [tokens, hidden].
    """
    added = linear(weights, "o_proj", attention)
    x = residual + rms_norm(config, weights, "attention_post_norm", added)
    added = gated_mlp(config, weights, rms_norm(config, weights, "mlp_norm", x))
    return x + rms_norm(config, weights, "mlp_post_norm", added)
