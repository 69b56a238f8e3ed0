"""Attention of new tokens to a cache, on whatever device the tensors are. Knows no tiers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode(q: Tensor, k: Tensor, v: Tensor, lens: list[int], mask: Tensor | None = None) -> Tensor:
    """Attend one new token per row to its cache.

    q: [rows, heads, head_dim]; k, v: [rows, kv_heads, seq, head_dim]
    lens: valid tokens of each row, the new one included; mask: length_mask(lens), if it is at hand.
    Returns [rows, heads, head_dim]. The queries of a KV group are folded into query rows, so the
    cache is read once however many heads share it.
    """
    rows, heads, head_dim = q.shape
    longest = max(lens)
    k, v = k[:, :, :longest], v[:, :, :longest]
    if mask is None:
        mask = length_mask(lens, q.device)
    grouped = q.reshape(rows, k.shape[1], heads // k.shape[1], head_dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return out.reshape(rows, heads, head_dim)


def length_mask(lens: list[int], device: torch.device) -> Tensor | None:
    """[rows, 1, 1, longest], true where a row has a token; None if all are equally long."""
    longest = max(lens)
    if min(lens) == longest:
        return None
    ends = torch.tensor(lens, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return torch.arange(longest, device=device) < ends[:, None, None, None]


def prefill(q: Tensor, k: Tensor, v: Tensor, start: int, query_tile: int = 512) -> Tensor:
    """Attend a chunk of one row to its cache and, causally, to itself.

    Over a cached prefix, query_tile queries at a time, which bounds the mask.

    q: [tokens, heads, head_dim]; k, v: [kv_heads, start + tokens, head_dim]
    start: tokens of the row before the chunk. Returns [tokens, heads, head_dim].
    """
    tokens, heads, head_dim = q.shape
    repeats = heads // k.shape[0]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=0) for x in (k, v))
    query, key, value = q.transpose(0, 1)[None], k[None], v[None]
    if start == 0:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out[0].transpose(0, 1)
    pieces = []
    for first in range(0, tokens, query_tile):
        last = min(first + query_tile, tokens)
        positions = torch.arange(start + first, start + last, device=q.device)
        mask = torch.arange(start + last, device=q.device) <= positions[:, None]
        keys, values = key[:, :, : start + last], value[:, :, : start + last]
        part = query[:, :, first:last]
        piece = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask)
        pieces.append(piece[0].transpose(0, 1))
    return torch.cat(pieces)
