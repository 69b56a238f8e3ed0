"""Attention of many rows to tokens that they share, as matrix products that read these once.

Attention comes in parts: over a tile of a prefix, and over a row's own tokens. Each part has a
result and the logarithm of the sum of exp(score), by which `merge_part` weighs it against the
others. In torch, on the device of the tensors. Scores, sums and results are in float32; on a GPU
16-bit values are multiplied as they are, in products with float32 results. Knows no pages and no
tiers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Attention of torch on a CPU that also returns the logarithms of the sums. It is no public
# function; where torch has none, products take its place.
_attend: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def attend_shared(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend one token of each row to the same keys and values.

    q: [rows, heads, head_dim]; k, v: [kv_heads, tokens, head_dim].
    starts: int64 [rows], the first of the tokens that each row attends; None for all of them. A row
    attends at least one.
    Returns float32 [rows, heads, head_dim] and float32 [rows, heads], the logarithms of the sums.
    """
    rows, heads, head_dim = q.shape
    kv_heads, tokens = k.shape[:2]
    sharing = heads // kv_heads
    grouped = q.view(rows, kv_heads, sharing, head_dim).transpose(0, 1)
    if not _multiplies_16_bits(q):
        grouped, k, v = grouped.float(), k.float(), v.float()
    queries = grouped.reshape(kv_heads, rows * sharing, head_dim)
    if starts is None and takes_parts(q.device):
        out, lse = (part[0] for part in _attend(queries[None], k[None], v[None]))
        return _by_rows(out, rows), _by_rows(lse[..., None], rows)[..., 0]
    if _multiplies_16_bits(q):
        scores = _product(queries, k.transpose(1, 2)).mul_(head_dim**-0.5)
    else:
        scores = (queries * head_dim**-0.5) @ k.transpose(1, 2)
    if starts is not None:
        before = torch.arange(tokens, device=q.device) < starts[:, None]
        of_rows = scores.view(kv_heads, rows, sharing, tokens)
        of_rows.masked_fill_(before[None, :, None], -torch.inf)
    most = scores.amax(-1, keepdim=True)
    weights = scores.sub_(most).exp_()
    sums = weights.sum(-1, keepdim=True)
    out = _product(weights.to(v.dtype), v).div_(sums)
    lse = sums.log_().add_(most)
    return _by_rows(out, rows), _by_rows(lse, rows)[..., 0]


def _multiplies_16_bits(x: Tensor) -> bool:
    """True if products of such tensors may have float32 results."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Float32 products of matrices, [n, rows, columns] of [n, rows, k] and [n, k, columns]."""
    return torch.bmm(a, b, out_dtype=torch.float32) if _multiplies_16_bits(a) else a @ b


def takes_parts(device: torch.device) -> bool:
    """True if torch's attention on a device returns the logarithms of the sums."""
    return device.type == "cpu" and _attend is not None


def _by_rows(x: Tensor, rows: int) -> Tensor:
    """[rows, heads, n] of [kv_heads, rows * heads of each, n]."""
    return x.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)


def merge_part(out: Tensor, lse: Tensor, rows: Tensor, part: tuple[Tensor, Tensor]) -> None:
    """Merge a part into what other parts gave for the same rows.

    out, lse: float32 [all rows, heads, head_dim] and [all rows, heads]; an lse of -infinity is that
    of no tokens. rows: int64, those of the part, which is as attend_shared returns it.
    """
    of_part, lse_of_part = part
    before = lse[rows]
    merged = torch.logaddexp(before, lse_of_part)
    others = out[rows].mul_((before - merged).exp_()[..., None])
    out[rows] = others.add_(of_part * (lse_of_part - merged).exp_()[..., None])
    lse[rows] = merged


def attend_in_parts(
    q: Tensor,
    before: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    out: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Attend a prompt's first chunk to the prefixes before it, and causally to itself, on a CPU.

    q, out: [tokens, heads, head_dim]; before: keys and values [kv_heads, n, head_dim] of the
    prefixes; own: those of the chunk, [kv_heads, tokens, head_dim]. sinks: as for
    attention.prefill.
    """
    first, sums = _attend_chunk(q, *before)
    second, own_sums = _attend_chunk(q, *own, is_causal=True)
    share = (own_sums - sums).sigmoid_()[..., None]  # of the second part in the sum of both
    merged = first.float().lerp_(second.float(), share)
    if sinks is not None:
        both = torch.logaddexp(sums, own_sums)
        merged *= (both - sinks.view(*both.shape[:2], 1)).sigmoid_()[..., None]
    out.unflatten(1, merged.shape[:2]).copy_(merged.permute(2, 0, 1, 3))


def _attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk on a CPU, and the logarithms of its sums.

    q: [tokens, heads, head_dim]; k, v: [kv_heads, n, head_dim].
    Returns [kv_heads, heads of each, tokens, head_dim], and float32 of that shape but its last.
    """
    kv_heads = len(k)
    grouped = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    k, v = (x[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
    return _attend(grouped, k, v, is_causal=is_causal)
