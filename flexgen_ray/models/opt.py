"""OPT (Zhang et al. 2022), every size: learned positions, LayerNorm (350M: after), ReLU."""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.model_config import ModelConfig
from flexgen_ray.models.layers import (
    ACTIVATIONS,
    Lookup,
    Weights,
    layer_norm,
    linear,
    project_heads,
)

POSITION_OFFSET = 2  # the first two rows of OPT's position table are never used

WEIGHT_NAMES = {
    "embed_tokens": "model.decoder.embed_tokens",
    "embed_positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "final_norm": "model.decoder.final_layer_norm",
    "lm_head": "lm_head",
    "attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "q_proj": "model.decoder.layers.{}.self_attn.q_proj",
    "k_proj": "model.decoder.layers.{}.self_attn.k_proj",
    "v_proj": "model.decoder.layers.{}.self_attn.v_proj",
    "o_proj": "model.decoder.layers.{}.self_attn.out_proj",
    "mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "up_proj": "model.decoder.layers.{}.fc1",
    "down_proj": "model.decoder.layers.{}.fc2",
}


def parse_config(hf: dict) -> ModelConfig:
    """From the keys of Hugging Face's OPTConfig."""
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    pre_norm = hf.get("do_layer_norm_before", True)
    affine = hf.get("layer_norm_elementwise_affine", True)
    bias = hf.get("enable_bias", True)
    return ModelConfig(
        family="opt",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=hf["ffn_dim"],
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        embedding_size=hf.get("word_embed_proj_dim", hidden),
        dtype=hf["dtype"],
        tie_word_embeddings=hf.get("tie_word_embeddings", True),
        activation=hf.get("activation_function", "relu"),
        norm_eps=1e-5,
        norm_weight=affine,
        norm_bias=affine,
        pre_norm=pre_norm,
        final_norm=pre_norm and not hf.get("_remove_final_layer_norm", False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        position_table=hf["max_position_embeddings"] + POSITION_OFFSET,
        eos_token_ids=hf["eos_token_ids"],
    )


def embed(config: ModelConfig, lookup: Lookup, tokens: Tensor, positions: Tensor) -> Tensor:
    """tokens, positions: [tokens]; returns hidden states [tokens, hidden]."""
    x = lookup("embed_tokens.weight", tokens)
    if config.embedding_size != config.hidden_size:
        x = x @ lookup("project_in.weight", None).T
    return x + lookup("embed_positions.weight", positions + POSITION_OFFSET)


def project(
    config: ModelConfig, weights: Weights, x: Tensor, positions: Tensor, layer: int
) -> tuple[Tensor, ...]:
    """x: [tokens, hidden]; returns q, k, v, each [tokens, heads, head_dim]."""
    if config.pre_norm:
        x = layer_norm(config, weights, "attention_norm", x)
    return project_heads(config, weights, x)


def finish(config: ModelConfig, weights: Weights, residual: Tensor, attention: Tensor) -> Tensor:
    """residual, attention: [tokens, hidden]; returns the layer's output [tokens, hidden]."""
    x = residual + linear(weights, "o_proj", attention)
    if not config.pre_norm:
        x = layer_norm(config, weights, "attention_norm", x)
    inner = layer_norm(config, weights, "mlp_norm", x) if config.pre_norm else x
    inner = ACTIVATIONS[config.activation](linear(weights, "up_proj", inner))
    x += linear(weights, "down_proj", inner)
    return x if config.pre_norm else layer_norm(config, weights, "mlp_norm", x)


def head(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """x: [rows, hidden]; returns float32 logits [rows, vocabulary]."""
    if config.final_norm:
        x = layer_norm(config, weights, "final_norm", x)
    if config.embedding_size != config.hidden_size:
        x = linear(weights, "project_out", x)
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(weights, name, x).float()
