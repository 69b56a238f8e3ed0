"""Gemma (Gemma Team 2024): Llama's, with embeddings scaled by the square root of the hidden size,
and norms whose weights are kept less one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flexgen_ray.model_config import ModelConfig
from flexgen_ray.models import llama
from flexgen_ray.models.layers import (
    Lookup,
    Weights,
    gated_mlp,
    linear,
    project_heads,
    rotate,
    token_logits,
    wide_rms_norm,
)

WEIGHT_NAMES = llama.WEIGHT_NAMES


def parse_config(hf: dict) -> ModelConfig:
    """From the keys of Hugging Face's GemmaConfig; ValueError names what is not supported."""
    refuse(hf, "use_bidirectional_attention")
    config = llama.parse_config({"tie_word_embeddings": True} | hf)
    activation = hf.get("hidden_act") or "gelu"
    # What was published says gelu, and means its approximation.
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    return replace(config, family="gemma", activation=activation)


def refuse(hf: dict, *features: str) -> None:
    """ValueError names the first feature that the model has."""
    for name in features:
        if hf.get(name):
            raise ValueError(f"{name} {hf[name]} is not supported")


def embed(config: ModelConfig, lookup: Lookup, tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens: [tokens]; returns hidden states [tokens, hidden]."""
    x = lookup("embed_tokens.weight", tokens)
    # Rounded to the dtype, as it was in training.
    return x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype)


def project(
    config: ModelConfig, weights: Weights, x: Tensor, positions: Tensor, layer: int
) -> tuple[Tensor, ...]:
    """x: [tokens, hidden]; returns q, k, v, each [tokens, heads or kv_heads, head_dim]."""
    assert config.rope is not None
    q, k, v = project_heads(config, weights, norm(config, weights, "attention_norm", x))
    q, k = rotate(config.rope, positions, q, k)
    return q, k, v


def finish(config: ModelConfig, weights: Weights, residual: Tensor, attention: Tensor) -> Tensor:
    """residual: [tokens, hidden]; attention: [tokens, q_size]; returns [tokens, hidden]."""
    x = residual + linear(weights, "o_proj", attention)
    return x + gated_mlp(config, weights, norm(config, weights, "mlp_norm", x))


def head(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """x: [rows, hidden]; returns float32 logits [rows, vocabulary]."""
    return token_logits(config, weights, norm(config, weights, "final_norm", x))


def norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """x: [..., size of the weight]."""
    return wide_rms_norm(config, weights, name, x, offset=1.0)
