"""OLMo 2 (OLMo et al. 2024): Llama, with the norms after attention and MLP instead of before.

Queries and keys are normed too, all heads of a token together.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.models import llama
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

WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "attention_norm": "model.layers.{}.post_attention_layernorm",
    "mlp_norm": "model.layers.{}.post_feedforward_layernorm",
}
embed, head = llama.embed, llama.head


def project(
    config: ModelConfig, weights: Weights, x: Tensor, positions: Tensor, layer: int
) -> tuple[Tensor, ...]:
    """Project hidden states to queries, keys and values, norm queries and keys, and rotate them.

    x: [tokens, hidden]. Returns q, k, v, each [tokens, heads or kv_heads, head_dim].
    """
    assert config.rope is not None
    q, k, v = project_heads(config, weights, x)
    q, k = rotate(config.rope, positions, *norm_heads(config, weights, q, k))
    return q, k, v


def finish(config: ModelConfig, weights: Weights, residual: Tensor, attention: Tensor) -> Tensor:
    """Complete a decoder layer after attention; outputs of attention and MLP are normed.

    residual: [tokens, hidden]; attention: [tokens, q_size]. Returns [tokens, hidden].
    """
    added = linear(weights, "o_proj", attention)
    x = residual + rms_norm(config, weights, "attention_norm", added)
    return x + rms_norm(config, weights, "mlp_norm", gated_mlp(config, weights, x))
