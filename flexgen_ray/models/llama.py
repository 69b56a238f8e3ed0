"""Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024), Mistral, Qwen 2 and 3.

Rotary positions, RMSNorm before attention and MLP, a gated MLP, grouped-query attention. These
models differ only in options of ModelConfig (biases, norms of queries and keys, sliding windows).

Every other family but OPT is written as its differences from this one. To add a family, start from
its nearest sibling: import that module, reuse the functions that are the same, extend WEIGHT_NAMES
where the checkpoint has other names, and write the functions that differ; phi3.py needs only names,
gemma.py one function, olmo2.py two. Then follow config_parsers.py.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.layers import (
    Lookup,
    Weights,
    add_linear,
    gated,
    project_heads,
    rms_norm,
    token_logits,
)

WEIGHT_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "attention_norm": "model.layers.{}.input_layernorm",
    "qkv_proj": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "qk_norm": ("model.layers.{}.self_attn.q_norm", "model.layers.{}.self_attn.k_norm"),
    "o_proj": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate_up_proj": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "down_proj": "model.layers.{}.mlp.down_proj",
}


def embed(config: ModelConfig, lookup: Lookup, tokens: Tensor, positions: Tensor) -> Tensor:
    """Embed tokens: [tokens]. Returns hidden states [tokens, hidden]."""
    return lookup("embed_tokens.weight", tokens)


def project(
    config: ModelConfig, weights: Weights, x: Tensor, rotation: Tensor | None, out: Tensor
) -> None:
    """Norm hidden states, project them to queries, keys and values, and rotate by position.

    x: [tokens, hidden]. rotation: layers.rotation of the tokens' positions, None without a rope.
    out: [tokens, q_size + 2 * kv_size], where queries, keys and values are put side by side.
    """
    assert rotation is not None
    x = rms_norm(config, weights, "attention_norm", x)
    project_heads(config, weights, x, rotation, out)


def finish(config: ModelConfig, weights: Weights, hidden: Tensor, attention: Tensor) -> None:
    """Complete a decoder layer after attention, in place: output projection, then norm and MLP.

    hidden: [tokens, hidden], the layer's input, which becomes its output.
    attention: [tokens, q_size].
    """
    add_linear(weights, "o_proj", attention, hidden)
    inner = gated(config, weights, rms_norm(config, weights, "mlp_norm", hidden))
    add_linear(weights, "down_proj", inner, hidden)


def head(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Norm final hidden states x, [rows, hidden]. Returns float32 logits [rows, vocabulary]."""
    return token_logits(config, weights, rms_norm(config, weights, "final_norm", x))
