"""Attention of many rows to tokens that they share, as matrix products that read these once.

Attention comes in parts: over a tile of a prefix, and over a row's own tokens. Each part has a
result and the logarithm of the sum of exp(score), by which `merge_part` weighs it against the
others. In torch, on the device of the tensors; float32 within. Knows no pages and no tiers.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    grouped = q.view(rows, kv_heads, sharing, head_dim).transpose(0, 1).float()
    queries = (grouped * head_dim**-0.5).reshape(kv_heads, rows * sharing, head_dim)
    scores = queries @ k.float().transpose(1, 2)
    if starts is not None:
        before = torch.arange(tokens, device=q.device) < starts[:, None]
        of_rows = scores.view(kv_heads, rows, sharing, tokens)
        of_rows.masked_fill_(before[None, :, None], -torch.inf)
    most = scores.amax(-1, keepdim=True)
    weights = scores.sub_(most).exp_()
    sums = weights.sum(-1, keepdim=True)
    out = (weights @ v.float()).div_(sums)
    lse = sums.log_().add_(most)
    out, lse = (x.view(kv_heads, rows, sharing, -1).transpose(0, 1) for x in (out, lse))
    return out.reshape(rows, heads, head_dim), lse.reshape(rows, heads)


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
