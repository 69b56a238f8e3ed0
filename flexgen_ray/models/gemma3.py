"""Gemma 3 (Gemma Team 2025), text only: Gemma's, with norms before and after attention and MLP, and
of queries and keys; most layers attend within a window, and rotate faster than the others.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flexgen_ray.model_config import ModelConfig
from flexgen_ray.models import gemma, llama
from flexgen_ray.models.layers import (
    Weights,
    gated_mlp,
    linear,
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


def parse_config(hf: dict) -> ModelConfig:
    """From the keys of Hugging Face's Gemma3TextConfig; ValueError names what is not supported."""
    gemma.refuse(hf, "attn_logit_softcapping", "final_logit_softcapping")
    config = gemma.parse_config(hf | {"hidden_act": hf.get("hidden_activation")})
    ropes = hf.get("rope_parameters")
    if not ropes:
        far = {"rope_theta": hf.get("rope_theta", 1e6)} | (hf.get("rope_scaling") or {})
        near = {"rope_theta": hf.get("rope_local_base_freq", 1e4)}
        ropes = {"full_attention": far, "sliding_attention": near}
    return replace(
        config,
        family="gemma3",
        overflows_float16=True,
        max_seq_len=hf["max_position_embeddings"],  # stretched already
        qk_norm="heads",
        branch_norms=True,
        query_scale=(config.head_dim / hf.get("query_pre_attn_scalar", 256)) ** 0.5,
        rope=llama.parse_rope({"rope_parameters": ropes["full_attention"]}),
        window_rope=llama.parse_rope({"rope_parameters": ropes["sliding_attention"]}),
        **llama.windows_of(_layer_types(hf), hf["sliding_window"]),
    )


def _layer_types(hf: dict) -> list[str]:
    """Where they aren't listed, as in what was published, every sixth attends all."""
    every = hf.get("sliding_window_pattern") or 6
    layers = range(1, hf["num_hidden_layers"] + 1)
    return hf.get("layer_types") or [
        "sliding_attention" if layer % every else "full_attention" for layer in layers
    ]


def project(
    config: ModelConfig, weights: Weights, x: Tensor, positions: Tensor, layer: int
) -> tuple[Tensor, ...]:
    """x: [tokens, hidden]; returns q, k, v, each [tokens, heads or kv_heads, head_dim]."""
    rope = config.rope if config.window(layer) is None else config.window_rope
    assert rope is not None
    q, k, v = project_heads(config, weights, rms_norm(config, weights, "attention_norm", x))
    q, k = rms_norm(config, weights, "q_norm", q), rms_norm(config, weights, "k_norm", k)
    q, k = rotate(rope, positions, q, k)
    return q * config.query_scale, k, v


def finish(config: ModelConfig, weights: Weights, residual: Tensor, attention: Tensor) -> Tensor:
    """residual: [tokens, hidden]; attention: [tokens, q_size]; returns [tokens, hidden]."""
    added = linear(weights, "o_proj", attention)
    x = residual + rms_norm(config, weights, "attention_post_norm", added)
    added = gated_mlp(config, weights, rms_norm(config, weights, "mlp_norm", x))
    return x + rms_norm(config, weights, "mlp_post_norm", added)
