"""Gemma 3 (Gemma Team 2025), text only: Gemma, with more norms and sliding windows.

Norms come before and after attention and MLP, and queries and keys are normed head by head. Most
layers attend within a sliding window, and have a rotary embedding of their own.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.models import gemma
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.layers import Weights, gated, linear, rms_norm

WEIGHT_NAMES = gemma.WEIGHT_NAMES | {
    "attention_post_norm": "model.layers.{}.post_attention_layernorm",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
embed, project, head = gemma.embed, gemma.project, gemma.head


def finish(config: ModelConfig, weights: Weights, hidden: Tensor, attention: Tensor) -> None:
    """Complete a decoder layer after attention, in place; its outputs are normed.

    hidden: [tokens, hidden]; attention: [tokens, q_size].
    """
    added = linear(weights, "o_proj", attention)
    hidden += rms_norm(config, weights, "attention_post_norm", added)
    inner = gated(config, weights, rms_norm(config, weights, "mlp_norm", hidden))
    hidden += rms_norm(config, weights, "mlp_post_norm", linear(weights, "down_proj", inner))
