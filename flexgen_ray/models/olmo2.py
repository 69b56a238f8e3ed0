"""OLMo 2 (OLMo et al. 2024): Llama, with the norms after attention and MLP instead of before.

Queries and keys are normed too, all heads of a token together.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.models import llama
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.layers import Weights, gated, linear, project_heads, rms_norm

WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "attention_norm": "model.layers.{}.post_attention_layernorm",
    "mlp_norm": "model.layers.{}.post_feedforward_layernorm",
}
embed, head = llama.embed, llama.head


def project(
    config: ModelConfig, weights: Weights, x: Tensor, rotation: Tensor | None, out: Tensor
) -> None:
    """Project hidden states to queries, keys and values, norm queries and keys, and rotate them.

    Arguments as in llama.py.
    """
    assert rotation is not None
    project_heads(config, weights, x, rotation, out)


def finish(config: ModelConfig, weights: Weights, hidden: Tensor, attention: Tensor) -> None:
    """Complete a decoder layer after attention, in place; its outputs are normed.

    hidden: [tokens, hidden]; attention: [tokens, q_size].
    """
    added = linear(weights, "o_proj", attention)
    hidden += rms_norm(config, weights, "attention_norm", added)
    added = linear(weights, "down_proj", gated(config, weights, hidden))
    hidden += rms_norm(config, weights, "mlp_norm", added)
