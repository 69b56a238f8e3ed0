"""Attention of new tokens to a cache, on whatever device the tensors are. Knows no tiers."""

from __future__ import annotations

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_ray.quant.packing import packed_bytes


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


def decode_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: list[int],
    sparsity: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend one new token per row to the tokens of its cache that weigh most (FlexGen, top-k).

    All but sparsity as for decode. Of each KV head's tokens those kept_tokens are kept whose
    softmax weights, summed over the heads that share them, are largest; of equal ones the first.
    The softmax is over these, and only their values are used. Weights are float32.
    """
    rows, heads, head_dim = q.shape
    kv_heads, longest = k.shape[1], max(lens)
    if mask is None:
        mask = length_mask(lens, q.device)
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim).float()
    scores = grouped @ k[:, :, :longest].float().transpose(-1, -2) / head_dim**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).sum(2)
    kept = [kept_tokens(end, sparsity) for end in lens]
    chosen = weights.sort(dim=-1, descending=True, stable=True).indices[..., : max(kept)]
    scores = scores.gather(-1, chosen[:, :, None].expand(-1, -1, scores.shape[2], -1))
    used = length_mask(kept, q.device)
    if used is not None:
        # What lies beyond a row's tokens may not be a number, which no weight of zero would mend.
        chosen = chosen.where(used[:, 0], chosen[..., :1])
        scores = scores.masked_fill(~used, -torch.inf)
    values = v.gather(2, chosen[..., None].expand(-1, -1, -1, head_dim))
    out = scores.softmax(-1).to(v.dtype) @ values
    return out.reshape(rows, heads, head_dim)


def kept_tokens(tokens: int, sparsity: float) -> int:
    """ceil(sparsity * tokens), at least one; ValueError if sparsity is not in (0, 1]."""
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity, the share of tokens kept, must be in (0, 1], not {sparsity}")
    # 0.07 * 100 is a little more than 7, but 7 tokens are meant.
    return max(1, ceil(sparsity * tokens - 1e-9 * tokens))


def cache_bits(cached: Tensor, head_dim: int) -> int | None:
    """Bits of a packed value of keys or values, which their shape tells; None if not packed.

    Raises ValueError for bytes that are no packed vectors of head_dim values.
    """
    if cached.dtype != torch.uint8:
        return None
    sizes = {packed_bytes(head_dim, bits): bits for bits in (4, 8)}
    if cached.shape[-1] not in sizes:
        taken = " or ".join(f"{size} in {bits} bits" for size, bits in sizes.items())
        raise ValueError(
            f"a packed vector of {head_dim} values has {taken}, not {cached.shape[-1]} bytes"
        )
    return sizes[cached.shape[-1]]


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
