"""The maths that families share, as functions over a dict of weights.

Knows tensors and ModelConfig; nothing of tiers, caches or the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_ray.models.config import ModelConfig, Rope

Weights = Mapping[str, Tensor]  # one layer's weights by this project's names
# lookup(name, rows) returns these rows of a table, or all of it for None, from where it is stored.
Lookup = Callable[[str, Tensor | None], Tensor]

_gelu = torch.ops.aten.gelu_
# Every activation works in place, so that a layer's largest temporary isn't there twice.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "silu": partial(F.silu, inplace=True),
    "gelu": _gelu,
    "gelu_new": partial(_gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(_gelu, approximate="tanh"),
}
_LARGE_MATRIX = 5 * 10**5  # elements; for smaller ones oneDNN's set-up takes what it saves
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply a linear layer to x, [tokens, in], with its bias if it has one.

    Returns [tokens, out].
    """
    return product(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x, [tokens, in], by the transposed weight, [out, in]. Returns [tokens, out].

    In float32 on a CPU torch uses MKL; oneDNN is used here, which is faster on CPUs not made by
    Intel.
    """
    is_large = weight.numel() >= _LARGE_MATRIX
    if is_large and _onednn is not None and x.dtype == torch.float32 and not x.is_cuda:
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def layer_norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply LayerNorm to x, [tokens, hidden]."""
    weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
    return F.layer_norm(x, (config.hidden_size,), weight, bias, config.norm_eps)


def rms_norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply RMSNorm to x, [tokens, hidden]."""
    return _rms_norm(config, weights[f"{name}.weight"], x)


def norm_heads(config: ModelConfig, weights: Weights, *heads: Tensor) -> list[Tensor]:
    """Norm queries and keys, each [tokens, heads or kv_heads, head_dim]."""
    parts = weights["qk_norm.weight"].split(config.stacked("qk_norm"))
    if config.qk_norm == "heads":
        return [
            _rms_norm(config, weight.view(x.shape[1:]), x)
            for weight, x in zip(parts, heads, strict=True)
        ]
    return [
        _rms_norm(config, weight, x.flatten(1)).view_as(x)
        for weight, x in zip(parts, heads, strict=True)
    ]


def _rms_norm(config: ModelConfig, weight: Tensor, x: Tensor) -> Tensor:
    """Apply RMSNorm over the last dimension of x in float32, as transformers does.

    weight: [size of that dimension], or with more dimensions of x.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config.norm_eps)
    if config.norm_offset is None:
        return weight * wide.to(x.dtype)
    return (wide * (weight.float() + config.norm_offset)).to(x.dtype)


def project_heads(config: ModelConfig, weights: Weights, x: Tensor) -> tuple[Tensor, ...]:
    """Project x, [tokens, hidden], to q, k, v, each [tokens, heads or kv_heads, head_dim]."""
    heads = linear(weights, "qkv_proj", x).unflatten(-1, (-1, config.head_dim))
    return heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)


def gated_mlp(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Apply the gated MLP to x, [tokens, hidden]. Returns [tokens, hidden]."""
    gate, up = linear(weights, "gate_up_proj", x).chunk(2, dim=-1)
    return linear(weights, "down_proj", ACTIVATIONS[config.activation](gate).mul_(up))


def token_logits(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Apply the head to x, [rows, hidden]. Returns float32 logits [rows, vocabulary]."""
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(weights, name, x).float()


def rotate(rope: Rope, positions: Tensor, *heads: Tensor) -> list[Tensor]:
    """Apply rotary position embedding (Su et al. 2021), with Hugging Face's order of halves.

    positions: [tokens]; each of heads: [tokens, heads, head_dim].
    """
    half = heads[0].shape[-1] // 2
    angles = positions[:, None].float() * _frequencies(rope, 2 * half, positions.device)
    cos, sin = (turn.to(heads[0].dtype)[:, None] for turn in (angles.cos(), angles.sin()))
    return [
        torch.cat((x[..., :half] * cos - x[..., half:] * sin,
                   x[..., half:] * cos + x[..., :half] * sin), dim=-1)
        for x in heads
    ]  # fmt: skip


@lru_cache(maxsize=32)
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Return the rotation per position in radians, [head_dim / 2].

    Type "linear" divides all frequencies by the factor; "llama3" only those of long wavelengths.
    """
    powers = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    frequencies = 1.0 / rope.theta**powers
    if rope.type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        turns = rope.original_max_seq_len / wavelengths
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    return frequencies.to(device)
