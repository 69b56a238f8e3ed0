"""The maths that families share, as functions over a dict of weights.

Knows tensors and ModelConfig; nothing of tiers, caches or the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.rotation import rotate

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


def linear(weights: Weights, name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Apply a linear layer to x, [tokens, in], with its bias if it has one.

    out, returned: [tokens, out]; None to allocate it.
    """
    return product(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), out)


def add_linear(weights: Weights, name: str, x: Tensor, hidden: Tensor) -> None:
    """Add a linear layer of x, [tokens, in], to hidden states [tokens, hidden], in place."""
    weight = weights[f"{name}.weight"]
    if f"{name}.bias" in weights or takes_onednn(x, weight):
        hidden += linear(weights, name, x)
    else:
        hidden.addmm_(x, weight.T)  # one launch


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Multiply x, [tokens, in], by the transposed weight, [out, in].

    out, returned: [tokens, out]; None to allocate it. In float32 on a CPU torch uses MKL; oneDNN is
    used here, which is faster on CPUs not made by Intel, but takes no `out`.
    """
    if _onednn is not None and takes_onednn(x, weight):
        result = _onednn(x, weight, bias, "none", [], "")
        return result if out is None else out.copy_(result)
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """True if oneDNN multiplies these."""
    is_large = weight.numel() >= _LARGE_MATRIX
    return is_large and _onednn is not None and x.dtype == torch.float32 and not x.is_cuda


def layer_norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply LayerNorm to x, [tokens, hidden]."""
    weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
    return F.layer_norm(x, (config.hidden_size,), weight, bias, config.norm_eps)


def rms_norm(config: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply RMSNorm to x, [tokens, hidden]."""
    return _rms_norm(config, weights[f"{name}.weight"], x)


def _rms_norm(config: ModelConfig, weight: Tensor, x: Tensor) -> Tensor:
    """Apply RMSNorm over the last dimension of x, which is the weight's, in float32.

    transformers rounds to the dtype before it multiplies by a plain weight, which takes a launch
    more.
    """
    if config.norm_offset:
        weight = weight.float() + config.norm_offset
        return F.rms_norm(x.float(), weight.shape, weight, config.norm_eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, config.norm_eps)


def project_heads(
    config: ModelConfig, weights: Weights, x: Tensor, rotation: Tensor, out: Tensor
) -> None:
    """Project x, [tokens, hidden], to queries, keys and values, and rotate queries and keys.

    rotation: of the tokens' positions. out: [tokens, q_size + 2 * kv_size].
    """
    heads = config.num_heads + config.num_kv_heads
    rotated = out.unflatten(-1, (-1, config.head_dim))[:, :heads]
    if config.qk_norm is None:
        qkv = linear(weights, "qkv_proj", x)
        own = config.q_size + config.kv_size
        out[:, own:].copy_(qkv[:, own:])
        rotate(rotation, qkv.unflatten(-1, (-1, config.head_dim))[:, :heads], rotated)
    else:
        linear(weights, "qkv_proj", x, out)
        rotate(rotation, _norm_heads(config, weights, out), rotated)
    if config.query_scale != 1:
        out[:, : config.q_size] *= config.query_scale


def _norm_heads(config: ModelConfig, weights: Weights, qkv: Tensor) -> Tensor:
    """Norm the queries and keys of qkv, [tokens, q_size + 2 * kv_size].

    Returns [tokens, heads + kv_heads, head_dim].
    """
    weight, sizes = weights["qk_norm.weight"], config.stacked("qk_norm")
    if config.qk_norm == "all":
        parts = zip(weight.split(sizes), qkv[:, : sum(sizes)].split(sizes, dim=-1), strict=True)
        normed = torch.cat([_rms_norm(config, *pair) for pair in parts], dim=-1)
        return normed.unflatten(-1, (-1, config.head_dim))
    # Values are normed too, and left out: without them a GPU would copy the others first.
    whole, size = qkv.unflatten(-1, (-1, config.head_dim)), (config.head_dim,)
    if config.norm_offset is not None:
        whole, weight = whole.float(), weight.float() + config.norm_offset
    weight = weight.view(-1, config.head_dim)
    normed = F.rms_norm(whole, size, None, config.norm_eps)[:, : len(weight)]
    return normed.mul_(weight).to(qkv.dtype)


def gated(config: ModelConfig, weights: Weights, x: Tensor, name: str = "gate_up_proj") -> Tensor:
    """Apply the MLP's gate and up projections, which are one weight, to x, [tokens, hidden].

    Returns [tokens, intermediate], which the down projection takes.
    """
    return gate(config, linear(weights, name, x))


def gate(config: ModelConfig, gate_up: Tensor) -> Tensor:
    """Multiply the up projection by the activated gate, in place. gate_up: [tokens, 2 * size].

    With a limit both are clamped, the gate from above only, and the up projection is counted from
    -1 (gpt-oss).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if (limit := config.swiglu_limit) is not None:
        gate.clamp_(max=limit)
        up.clamp_(-limit, limit).add_(1).mul_(gate)
        return gate.mul_(config.swiglu_alpha).sigmoid_().mul_(up)
    return ACTIVATIONS[config.activation](gate).mul_(up)


def token_logits(config: ModelConfig, weights: Weights, x: Tensor) -> Tensor:
    """Apply the head to x, [rows, hidden]. Returns float32 logits [rows, vocabulary]."""
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(weights, name, x).float()
