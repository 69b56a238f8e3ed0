"""Attention of new tokens to a cache, in torch, on the device of the tensors. Knows no tiers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_ray.config import SINK_DIMS, kept_tokens
from flexgen_ray.quant.packing import packed_bytes


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: list[int],
    mask: Tensor | None = None,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend one new token per row to its cache.

    q: [rows, heads, head_dim]; k, v: [rows, kv_heads, seq, head_dim]
    lens: valid tokens of each row, the new one included.
    mask: length_mask(lens, device, window), or that made additive, if the caller has it already.
    window: number of each row's last tokens that are attended, None for all.
    out, returned: [rows, heads, head_dim]; None to allocate it.
    The query heads that share a KV head become rows of one query matrix, so the cache is read once.
    """
    rows, heads, head_dim = q.shape
    tokens = span(lens, window)
    k, v = k[:, :, tokens], v[:, :, tokens]
    if mask is None:
        mask = length_mask(lens, q.device, window)
    grouped = q.reshape(rows, k.shape[1], heads // k.shape[1], head_dim)
    attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    if out is None:
        return attended.reshape(rows, heads, head_dim)
    out.view(grouped.shape).copy_(attended)
    return out


def decode_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: list[int],
    sparsity: float,
    mask: Tensor | None = None,
    window: int | None = None,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend one new token per row to the tokens of its cache that weigh most (FlexGen, top-k).

    sparsity: share of the tokens that are attended; lse: None, or where log_sum_exp over these and
    the sinks is written; sinks: as for select_tokens; other arguments as for decode. Only the
    values of the selected tokens are used.
    """
    selected, tokens = select_tokens(q, k, lens, sparsity, mask, window, sinks), span(lens, window)
    if lse is not None:
        lse.copy_(log_sum_exp(q, selected.gather(k[:, :, tokens]), selected.weights != 0))
        if sinks is not None:
            torch.logaddexp(lse, sinks, out=lse)
    return weighted_sum(selected.weights, selected.gather(v[:, :, tokens]))


@dataclass(frozen=True)
class SelectedTokens:
    """Tokens that decoding rows attend, heaviest first, and their weights.

    tokens: int64 [rows, kv_heads, kept], counted from the start of span(lens, window); a row that
    keeps fewer repeats its first.
    weights: float32 [rows, kv_heads, heads of each, kept], zero for repeated tokens.
    """

    tokens: Tensor
    weights: Tensor

    def gather(self, cached: Tensor) -> Tensor:
        """Selected entries, [rows, kv_heads, kept, width], of [rows, kv_heads, seq, width]."""
        return cached.gather(2, self.tokens[..., None].expand(-1, -1, -1, cached.shape[-1]))


def select_tokens(
    q: Tensor,
    k: Tensor,
    lens: list[int],
    sparsity: float,
    mask: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> SelectedTokens:
    """Select the tokens of each KV head that weigh most; arguments as for decode_sparse.

    A token's weight is its softmax over the window's tokens, summed over the query heads that share
    the KV head; of equal weights the first wins. config.kept_tokens says how many are selected. The
    weights returned are a softmax over the selected tokens alone. sinks: float32 [heads], a score
    of each head that joins both softmaxes and is selected by none; None for none.
    """
    rows, heads, head_dim = q.shape
    kv_heads, tokens = k.shape[1], span(lens, window)
    if mask is None:
        mask = length_mask(lens, q.device, window)
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, head_dim).float()
    scores = grouped @ k[:, :, tokens].float().transpose(-1, -2) / head_dim**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = _softmax(scores, sinks).sum(2)
    # NaN if any score is NaN, else 0: the selected tokens alone might not show it.
    fault = (weights[..., :1] * 0)[:, :, None]
    if mask is not None:
        weights = weights.masked_fill(~mask[:, 0], -1)  # less than weights that are 0 by underflow
    counts = [kept_tokens(min(end, window or end), sparsity) for end in lens]
    selected = weights.sort(dim=-1, descending=True, stable=True).indices[..., : max(counts)]
    scores = scores.gather(-1, selected[:, :, None].expand(-1, -1, scores.shape[2], -1))
    used = length_mask(counts, q.device)
    if used is not None:
        # Beyond a row's tokens the cache may hold NaN, which a weight of 0 would not hide.
        selected = selected.where(used[:, 0], selected[..., :1])
        scores = scores.masked_fill(~used, -torch.inf)
    return SelectedTokens(selected, _softmax(scores, sinks).add_(fault))


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of scores [rows, kv_heads, heads of each, tokens], beside a sink of each head."""
    if sinks is None:
        return scores.softmax(-1)
    beside = sinks.view(*scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
    return torch.cat((scores, beside), -1).softmax(-1)[..., :-1]


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Let each head's sink take its share of attention, in place.

    out: [rows, heads, head_dim]; lse: float32 [rows, heads], log_sum_exp over the attended tokens,
    which the sink joins; sinks: float32 [heads].
    """
    out *= (lse - sinks).sigmoid_()[..., None]
    torch.logaddexp(lse, sinks, out=lse)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum of the selected tokens' values.

    weights: of SelectedTokens; values: [rows, kv_heads, kept, head_dim].
    Returns [rows, heads, head_dim] in the dtype of values.
    """
    return (weights.to(values.dtype) @ values).flatten(1, 2)


def log_sum_exp(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logarithm of the sum of exp(score) over the tokens that a row attends; float32 [rows, heads].

    q: [rows, heads, head_dim]; k: [rows, kv_heads, tokens, head_dim].
    mask: tokens that are attended, bool [rows, kv_heads or 1, heads of each or 1, tokens], None for
    all.
    """
    rows, heads, head_dim = q.shape
    grouped = q.reshape(rows, k.shape[1], heads // k.shape[1], head_dim).float()
    scores = grouped @ k.float().transpose(-1, -2) / head_dim**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.logsumexp(-1).flatten(1)


def gather_pages(plane: Tensor, tables: Tensor, tokens: slice) -> Tensor:
    """Keys or values of rows whose tables name the pages, as decode takes them.

    plane: [pages, kv_heads, tokens of a page, width]; tables: [rows, n], token t of a row being in
    its page t // tokens of a page; tokens: those that are gathered of every row, see span. On one
    device.
    An entry that is no page's number is taken as one, so that rows may be of different lengths; see
    clear_unattended. Returns [rows, kv_heads, tokens, width], a new tensor with a dense last
    dimension.
    """
    pages, kv_heads, size, width = plane.shape
    first = tokens.start // size
    tables = tables[:, first : -(-tokens.stop // size)].clamp(0, pages - 1)
    # index_select would copy a whole plane that isn't dense, so it selects heads of pages.
    heads = torch.arange(kv_heads, dtype=tables.dtype, device=tables.device)
    lines = tables[:, None] * kv_heads + heads[:, None]
    chosen = plane.flatten(0, 1).index_select(0, lines.flatten())
    rows = chosen.view(len(tables), kv_heads, -1, width)
    return rows[:, :, tokens.start - first * size : tokens.stop - first * size]


def clear_unattended(cached: Tensor, mask: Tensor | None) -> None:
    """Write zeros where a row attends nothing: a weight of 0 doesn't hide NaN.

    cached: [rows, kv_heads, tokens, width], of the tokens of mask, which is a length_mask.
    """
    if mask is not None:
        cached.masked_fill_(~mask[:, 0, 0, None, :, None], 0)


def cache_bits(cached: Tensor, head_dim: int) -> int | None:
    """Bits of a quantized value in a cache of keys or values, None if it isn't quantized.

    The last dimension's size tells. Raises ValueError for a size that no packed vector of head_dim
    values has.
    """
    if cached.dtype != torch.uint8:
        return None
    sizes = {packed_bytes(head_dim, bits): bits for bits in (4, 8)}
    if cached.shape[-1] not in sizes:
        allowed = " or ".join(f"{size} in {bits} bits" for size, bits in sizes.items())
        raise ValueError(
            f"a packed vector of {head_dim} values has {allowed}, not {cached.shape[-1]} bytes"
        )
    return sizes[cached.shape[-1]]


def span(lens: list[int], window: int | None = None) -> slice:
    """Cached tokens that some row attends, for rows with these numbers of valid tokens."""
    return slice(0 if window is None else max(0, min(lens) - window), max(lens))


def length_mask(lens: list[int], device: torch.device, window: int | None = None) -> Tensor | None:
    """Mask of the tokens that each row attends, bool [rows, 1, 1, tokens of span(lens, window)].

    None if all rows are equally long.
    """
    if min(lens) == max(lens):
        return None
    tokens = span(lens, window)
    ends = torch.tensor(lens, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    ends = ends[:, None, None, None]
    places = torch.arange(tokens.start, tokens.stop, device=device)
    mask = places < ends
    return mask if window is None else mask & (places >= ends - window)


def additive_mask(mask: Tensor, dtype: torch.dtype, alignment: int = 1) -> Tensor:
    """Make a mask of what is attended one that is added to the scores: 0, or -infinity.

    mask: bool [rows, 1, 1, tokens]. alignment: number of which the elements from row to row are a
    multiple.
    """
    tokens = mask.shape[-1]
    shape = (*mask.shape[:-1], -(-tokens // alignment) * alignment)
    added = torch.zeros(shape, dtype=dtype, device=mask.device)[..., :tokens]
    return added.masked_fill_(~mask, -torch.inf)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    query_tile: int = 512,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend a chunk of one row to its cache and, causally, to itself.

    q: [tokens, heads, head_dim]; k, v: [kv_heads, start + tokens, head_dim]
    start: number of the row's tokens before the chunk.
    query_tile: most queries at a time over a cached prefix or beyond the window, which bounds the
    mask's size.
    window: number of last tokens that each token attends, None for all.
    sinks: float32 [heads], a score of each head that joins the softmax and has no value; None for
    none.
    Returns [tokens, heads, head_dim].
    """
    tokens, heads, head_dim = q.shape
    if window is not None and start >= window:
        before = start - window + 1
        k, v, start = k[:, before:], v[:, before:], window - 1
    lead, scale = 0, None
    if sinks is not None:
        # A token before all others is the sink, for queries as for keys.
        lead, scale = 1, head_dim**-0.5
        q, k, v = _with_sinks(q, k, v, sinks)
    elif heads > k.shape[0]:
        k, v = (x.repeat_interleave(heads // k.shape[0], dim=0) for x in (k, v))
    query, key, value = q.transpose(0, 1)[None], k[None], v[None]
    attend = partial(F.scaled_dot_product_attention, scale=scale)
    if start == 0 and tokens <= (window or tokens):
        out = attend(query, key, value, is_causal=True)
        return out[0, :, lead:, :head_dim].transpose(0, 1)
    pieces = []
    for first in range(0, tokens, query_tile):
        last = min(first + query_tile, tokens)
        positions = torch.arange(start + first, start + last, device=q.device)[:, None]
        seen = slice(0 if window is None else max(0, start + first - window + 1), start + last)
        places = torch.arange(seen.start - lead, seen.stop, device=q.device)
        mask = places <= positions
        if window is not None:
            mask &= places > positions - window
        keys, values = (x[:, :, seen.start : seen.stop + lead] for x in (key, value))
        if sinks is not None:
            mask[:, 0] = True
            if seen.start:
                _make_sink(keys, values, head_dim)
        part = query[:, :, lead + first : lead + last]
        piece = attend(part, keys, values, attn_mask=mask)
        pieces.append(piece[0, ..., :head_dim].transpose(0, 1))
    return torch.cat(pieces)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a prompt's chunk with a token before them that is the sink.

    In a dimension behind a head's own each query has the sink, the sink's key has one and all other
    keys have zero: so its score is the sink, for any kernel. Its value is zero. Arguments as for
    prefill; keys and values are repeated for the query heads that share them.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, cached, _ = k.shape
    wide, repeats = head_dim + SINK_DIMS, heads // kv_heads
    queries = q.new_zeros(tokens + 1, heads, wide)
    queries[1:, :, :head_dim] = q
    queries[:, :, head_dim] = sinks * head_dim**0.5
    keys, values = q.new_zeros(2, kv_heads, repeats, cached + 1, wide)
    keys[:, :, 1:, :head_dim] = k[:, None]
    values[:, :, 1:, :head_dim] = v[:, None]
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    _make_sink(keys, values, head_dim)
    return queries, keys, values


def _make_sink(keys: Tensor, values: Tensor, head_dim: int) -> None:
    """Make the first token, which no query needs any longer, the sink; see _with_sinks."""
    keys[..., 0, :] = 0
    keys[..., 0, head_dim] = 1
    values[..., 0, :] = 0
