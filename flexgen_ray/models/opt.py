"""OPT (Zhang et al. 2022), every size: learned positions, LayerNorm with bias, a plain ReLU MLP.

OPT-350M is the exception: its norms come after attention and MLP (ModelConfig.pre_norm), it has no
final norm, and its embedding is narrower than its hidden states. The one family that is not written
as its differences from Llama.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_parsers import POSITION_OFFSET
from flexgen_ray.models.layers import (
    ACTIVATIONS,
    Lookup,
    Weights,
    add_linear,
    layer_norm,
    linear,
)

WEIGHT_NAMES = {
    "embed_tokens": "model.decoder.embed_tokens",
    "embed_positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "final_norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
    "attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "qkv_proj": (
        "model.decoder.layers.{}.self_attn.q_proj",
        "model.decoder.layers.{}.self_attn.k_proj",
        "model.decoder.layers.{}.self_attn.v_proj",
    ),
    "o_proj": "model.decoder.layers.{}.self_attn.out_proj",
    "mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "up_proj": "model.decoder.layers.{}.fc1",
    "down_proj": "model.decoder.layers.{}.fc2",
}


def embed(config: ModelConfig, lookup: Lookup, tokens: Tensor, positions: Tensor) -> Tensor:
    """Embed tokens and their positions, both [tokens]. Returns hidden states [tokens, hidden]."""
    x = lookup("embed_tokens.weight", tokens)
    if config.embedding_size != config.hidden_size:
        x = x @ lookup("project_in.weight", None).T
    return x + lookup("embed_positions.weight", positions + POSITION_OFFSET)


def project(
    config: ModelConfig, weights: Weights, x: Tensor, rotation: Tensor | None, out: Tensor
) -> None:
    """Norm hidden states x, [tokens, hidden], and project them to queries, keys and values.

    rotation: None. out: [tokens, 3 * q_size].
    """
    if config.pre_norm:
        x = layer_norm(config, weights, "attention_norm", x)
    linear(weights, "qkv_proj", x, out)


def finish(config: ModelConfig, weights: Weights, hidden: Tensor, attention: Tensor) -> None:
    """Complete a decoder layer after attention, in place: output projection, then the MLP.

    hidden, attention: [tokens, hidden].
    """
    add_linear(weights, "o_proj", attention, hidden)
    if not config.pre_norm:
        hidden.copy_(layer_norm(config, weights, "attention_norm", hidden))
    inner = layer_norm(config, weights, "mlp_norm", hidden) if config.pre_norm else hidden
    inner = ACTIVATIONS[config.activation](linear(weights, "up_proj", inner))
    add_linear(weights, "down_proj", inner, hidden)
    if not config.pre_norm:
        hidden.copy_(layer_norm(config, weights, "mlp_norm", hidden))


def head(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Norm final hidden states x, [rows, hidden]. Returns float32 logits [rows, vocabulary]."""
    if config.final_norm:
        x = layer_norm(config, weights, "final_norm", x)
    if config.embedding_size != config.hidden_size:
        x = linear(weights, "project_out", x)
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(weights, name, x).float()
