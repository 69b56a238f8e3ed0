"""Attention of new tokens to a cache, on whatever device the tensors are. Knows no tiers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_ray.config import kept_tokens
from flexgen_ray.quant.packing import packed_bytes


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: list[int],
    mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend one new token per row to its cache.

    q: [rows, heads, head_dim]; k, v: [rows, kv_heads, seq, head_dim]
    lens: valid tokens of each row, the new one included; window: how many of them, the last ones,
    are attended, if not all; mask: length_mask(lens, window), if it is at hand.
    Returns [rows, heads, head_dim]. The queries of a KV group are folded into query rows, so the
    cache is read once however many heads share it.
    """
    rows, heads, head_dim = q.shape
    tokens = span(lens, window)
    k, v = k[:, :, tokens], v[:, :, tokens]
    if mask is None:
        mask = length_mask(lens, q.device, window)
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
    window: int | None = None,
) -> Tensor:
    """Attend one new token per row to the tokens of its cache that weigh most (FlexGen, top-k).

    All but sparsity as for decode; only the values of the tokens chosen are used.
    """
    chosen = select_tokens(q, k, lens, sparsity, mask, window)
    return weighted_sum(chosen.weights, chosen.of(v[:, :, span(lens, window)]))


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens that decoding rows attend, the best first, and how they weigh.

    tokens: int64 [rows, kv_heads, kept], from the first of span on; where a row keeps fewer its
    first again; weights: float32 [rows, kv_heads, heads of each, kept], zero for those.
    """

    tokens: Tensor
    weights: Tensor

    def of(self, cached: Tensor) -> Tensor:
        """[rows, kv_heads, kept, width] out of [rows, kv_heads, seq, width]."""
        return cached.gather(2, self.tokens[..., None].expand(-1, -1, -1, cached.shape[-1]))


def select_tokens(
    q: Tensor,
    k: Tensor,
    lens: list[int],
    sparsity: float,
    mask: Tensor | None = None,
    window: int | None = None,
) -> SelectedTokens:
    """Of each KV head's tokens within the window those kept_tokens whose softmax weights, summed
    over the heads that share them, are largest; of equal ones the first. They weigh by a softmax
    over these.

    Arguments as for decode_sparse.
    """
    rows, heads, head_dim = q.shape
    kv_heads, tokens = k.shape[1], span(lens, window)
    if mask is None:
        mask = length_mask(lens, q.device, window)
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim).float()
    scores = grouped @ k[:, :, tokens].float().transpose(-1, -2) / head_dim**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).sum(2)
    # NaN if any score is, zero otherwise: the tokens that are kept might not tell of it.
    fault = (weights[..., :1] * 0)[:, :, None]
    if mask is not None:
        weights = weights.masked_fill(~mask[:, 0], -1)  # below those that vanish
    kept = [kept_tokens(min(end, window or end), sparsity) for end in lens]
    chosen = weights.sort(dim=-1, descending=True, stable=True).indices[..., : max(kept)]
    scores = scores.gather(-1, chosen[:, :, None].expand(-1, -1, scores.shape[2], -1))
    used = length_mask(kept, q.device)
    if used is not None:
        # What lies beyond a row's tokens may not be a number, which no weight of zero would mend.
        chosen = chosen.where(used[:, 0], chosen[..., :1])
        scores = scores.masked_fill(~used, -torch.inf)
    return SelectedTokens(chosen, scores.softmax(-1).add_(fault))


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """weights: as chosen; values: [rows, kv_heads, kept, head_dim], of the tokens chosen.

    Returns [rows, heads, head_dim] in the dtype of values.
    """
    return (weights.to(values.dtype) @ values).flatten(1, 2)


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


def span(lens: list[int], window: int | None = None) -> slice:
    """The tokens of a cache that rows of these lengths attend, from the first of any row on."""
    return slice(0 if window is None else max(0, min(lens) - window), max(lens))


def length_mask(lens: list[int], device: torch.device, window: int | None = None) -> Tensor | None:
    """[rows, 1, 1, tokens of span], true where a row attends one; None if all are equally long."""
    if min(lens) == max(lens):
        return None
    tokens = span(lens, window)
    ends = torch.tensor(lens, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    ends = ends[:, None, None, None]
    places = torch.arange(tokens.start, tokens.stop, device=device)
    mask = places < ends
    return mask if window is None else mask & (places >= ends - window)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    query_tile: int = 512,
    window: int | None = None,
) -> Tensor:
    """Attend a chunk of one row to its cache and, causally, to itself.

    Over a cached prefix or beyond the window, query_tile queries at a time, which bounds the mask.

    q: [tokens, heads, head_dim]; k, v: [kv_heads, start + tokens, head_dim]
    start: tokens of the row before the chunk; window: as for decode, of each token.
    Returns [tokens, heads, head_dim].
    """
    tokens, heads, head_dim = q.shape
    if window is not None and start >= window:
        before = start - window + 1
        k, v, start = k[:, before:], v[:, before:], window - 1
    repeats = heads // k.shape[0]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=0) for x in (k, v))
    query, key, value = q.transpose(0, 1)[None], k[None], v[None]
    if start == 0 and tokens <= (window or tokens):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out[0].transpose(0, 1)
    pieces = []
    for first in range(0, tokens, query_tile):
        last = min(first + query_tile, tokens)
        positions = torch.arange(start + first, start + last, device=q.device)[:, None]
        seen = slice(0 if window is None else max(0, start + first - window + 1), start + last)
        places = torch.arange(seen.start, seen.stop, device=q.device)
        mask = places <= positions
        if window is not None:
            mask &= places > positions - window
        keys, values = key[:, :, seen], value[:, :, seen]
        part = query[:, :, first:last]
        piece = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask)
        pieces.append(piece[0].transpose(0, 1))
    return torch.cat(pieces)
