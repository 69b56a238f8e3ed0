"""Attention of decoding rows to pages of a cache, on CUDA: one pass over each row's own tokens.

A program takes one row, one KV head and a part of the row's tokens. It follows the row's table, a
page number once for 16 tokens, and never waits for the host. Parts of a row are merged by a second
kernel. Packed caches are unpacked in registers, to the very values of pack_cuda.

Scores and sums come from tensor cores where Triton has them, from sm_80 on: tokens and dimensions
are the long side of the products and query heads the short one, padded to 8. Elsewhere a padded
product costs 8 heads for each, so up to 4 heads are multiplied and summed instead, with sums for
each place of a tile, so that no warp waits for another; and float32 everywhere, since tensor cores
round it. More heads take products all the same, which read the cache once for 8 heads
(docs/results/decode-attention-instructions.json counts the instructions of both).
Needs Triton.
"""

from __future__ import annotations

from functools import cache
from math import gcd, log, sqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexgen_ray.config import PAGE_TOKENS
from flexgen_ray.kernels.attention import cache_bits
from flexgen_ray.kernels.pack_cuda import _float_of_half, address_divisor
from flexgen_ray.kernels.paged_splits import attended, num_splits, partial_floats
from flexgen_ray.quant.packing import GROUP, PARAMETER_BYTES, num_groups

MOST_DIM = 256
_DIMS_STEP = 16
_VECTOR = 16  # bytes of the widest load
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_NO_WINDOW = 2**30
# Bits of 2**23 as a float32, to which codes are added in its last bits. An argument, since as a
# constant it would be moved into a register for each code.
_MAGIC = 0x4B000000
_LOG2E = 1 / log(2)
_INTEGERS = (
    "rows", "kv_heads", "splits", "window", "table_row", "q_row", "q_head", "out_row", "out_head",
    "lse_row", "k_page", "k_head", "k_token", "v_page", "v_head", "v_token", "magic",
)  # fmt: skip


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lens: Tensor,
    out: Tensor,
    *,
    most: int,
    window: int | None = None,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
    workspace: Tensor | None = None,
) -> None:
    """Attend one new token per row to the row's pages, into out; waits for nothing.

    q, out: [rows, heads, head_dim], dense in their last dimension; head_dim a multiple of 16 up to
    MOST_DIM.
    keys, values: [pages, kv_heads, PAGE_TOKENS, width], dense in their last dimension: head_dim
    values of q's dtype, or uint8 packed vectors (quant/packing.py) of which those are unpacked.
    tables: int32 [rows, pages of a row], dense in its last dimension: the pages of each row's
    tokens. Entries of pages without attended tokens may be anything.
    lens: int32 [rows], valid tokens of each row, the new one included; a row of 0 gets zeros.
    most: no row has more tokens than this.
    window: number of each row's last tokens that are attended, None for all.
    lse: float32 [rows, heads], dense in its last dimension, for the natural logarithm of each
    softmax's denominator, its sink included.
    sinks: float32 [heads], a score of each head that joins its denominator and has no value.
    workspace: float32, paged_splits.workspace_bytes long at least; None to allocate it.
    Raises ValueError for tensors that don't fit together or that no kernel takes.
    """
    _check(q, keys, values, tables, out)
    rows, heads, head_dim = q.shape
    if not rows:
        return
    kv_heads = keys.shape[1]
    multiprocessors, has_dot = machine(q.device)
    splits = num_splits(rows * kv_heads, attended(most, window), multiprocessors)
    bits = cache_bits(keys, head_dim)
    known = variant(head_dim, q.dtype, bits, heads // kv_heads, has_dot)
    parts, ends = _partial(splits, q, workspace)
    grid = rows * kv_heads * triton.cdiv(heads // kv_heads, known["TAKEN"]), splits
    with torch.cuda.device_of(q):
        _attend[grid](
            q, keys, values, tables, lens, out, lse, sinks, parts, ends, rows, kv_heads, splits,
            _NO_WINDOW if window is None else window, tables.stride(0), *q.stride()[:2],
            *out.stride()[:2], 0 if lse is None else lse.stride(0), *keys.stride()[:3],
            *values.stride()[:3], _MAGIC, K_ALIGN=_alignment(keys), V_ALIGN=_alignment(values),
            **known,
        )  # fmt: skip
        if splits > 1:
            _merge[(rows * heads,)](
                parts, ends, lens, out, lse, sinks, rows, heads, splits, *out.stride()[:2],
                0 if lse is None else lse.stride(0),
                D=head_dim, WIDTH=triton.next_power_of_2(head_dim),
                SPLITS=triton.next_power_of_2(splits),
            )  # fmt: skip


def variant(
    head_dim: int, dtype: torch.dtype, bits: int | None, sharing: int, has_dot: bool
) -> dict[str, Any]:
    """Constants of the kernel for a kind of cache, its number of stages among them.

    bits: of a packed value, None if it isn't packed. sharing: query heads that share a KV head.
    has_dot: Triton uses the GPU's tensor cores.
    """
    padded = triton.next_power_of_2(head_dim)
    shared = triton.next_power_of_2(sharing)
    by_dot = dtype != torch.float32 and (has_dot or sharing > 4)
    if by_dot:
        taken = min(shared, 32 if has_dot else 8)
        heads, tile = max(taken, 8), 64 if has_dot and padded <= 128 else 32
        if has_dot and bits and padded <= 64:
            tile = 128  # since so few bytes are in 64 tokens
    else:
        taken = heads = min(shared, 4, max(1, 512 // padded))
        tile = min(64, max(PAGE_TOKENS, 8192 // (heads * padded)))
    groups = triton.next_power_of_2(num_groups(head_dim))
    width = groups * GROUP * bits // 8 if bits else padded
    return {
        "SCALE": _LOG2E / sqrt(head_dim), "D": head_dim, "WIDTH": width, "BITS": bits or 0,
        "GROUP": GROUP, "GROUPS": groups, "SHARING": sharing, "TAKEN": taken, "HEADS": heads,
        "TILE": tile, "PAGE": PAGE_TOKENS, "BY_DOT": by_dot, "num_stages": 2,
    }  # fmt: skip


def _partial(splits: int, q: Tensor, workspace: Tensor | None) -> tuple[Tensor | None, ...]:
    """Memory for partial sums, and for their largest scores and weights; None for one split."""
    if splits == 1:
        return None, None
    rows, heads, head_dim = q.shape
    floats = partial_floats(splits, rows, heads, head_dim)
    if workspace is None:
        workspace = torch.empty(floats, dtype=torch.float32, device=q.device)
    if workspace.dtype != torch.float32 or workspace.numel() < floats:
        raise ValueError(
            f"the workspace has {workspace.numel()} numbers of {workspace.dtype}, and {splits}"
            f" splits take {floats} of torch.float32: allocate workspace_bytes"
        )
    sums = splits * rows * heads * head_dim
    return workspace[:sums], workspace[sums:floats]


def _check(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, out: Tensor) -> None:
    """Raise ValueError unless the kernel takes these tensors."""
    rows, heads, head_dim = q.shape
    if head_dim % _DIMS_STEP or head_dim > MOST_DIM:
        raise ValueError(
            f"heads have {head_dim} dimensions, not a multiple of {_DIMS_STEP} up to {MOST_DIM}:"
            " gather the pages, and attend with torch"
        )
    if keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"keys are {keys.dtype} {list(keys.shape)} and values {values.dtype}"
            f" {list(values.shape)}: both must be alike"
        )
    width = keys.shape[-1] if cache_bits(keys, head_dim) else head_dim
    kv_heads = keys.shape[1]
    if keys.shape[2:] != (PAGE_TOKENS, width) or heads % kv_heads:
        raise ValueError(
            f"pages of {list(keys.shape)} don't fit {heads} query heads of {head_dim} dimensions:"
            f" they must be [pages, a divisor of {heads}, {PAGE_TOKENS}, {width}]"
        )
    if q.dtype not in _DTYPES or keys.dtype not in (q.dtype, torch.uint8):
        raise ValueError(f"queries of {q.dtype} can't attend to pages of {keys.dtype}")
    if out.shape != q.shape or tables.shape[0] != rows or tables.dtype != torch.int32:
        raise ValueError(
            f"{rows} rows of queries have out {list(out.shape)} and tables {tables.dtype}"
            f" {list(tables.shape)}: they must be {list(q.shape)} and torch.int32 [{rows}, pages]"
        )
    strides = [x.stride(-1) for x in (q, keys, values, tables, out) if x.shape[-1] > 1]
    if strides.count(1) != len(strides):
        raise ValueError(f"tensors must be dense in their last dimension, not strided {strides}")
    common = gcd(address_divisor(keys), address_divisor(values))
    if keys.dtype == torch.uint8 and common % PARAMETER_BYTES:
        raise ValueError(f"packed vectors must begin at multiples of {PARAMETER_BYTES} bytes")


def _alignment(pool: Tensor) -> int:
    """Elements, at most 16 bytes, to which all vectors of a pool are aligned."""
    return max(1, gcd(address_divisor(pool), _VECTOR) // pool.element_size())


@cache
def machine(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors of a device, and whether Triton uses its tensor cores, as from sm_80 on.

    A CPU, on which kernels are interpreted, counts as a small GPU.
    """
    if device.type != "cuda":
        return 2, True
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major >= 8


@triton.jit(do_not_specialize=_INTEGERS)
def _attend(
    q, keys, values, tables, lens, out, lse, sinks, parts, ends, rows, kv_heads, splits, window,
    table_row, q_row, q_head, out_row, out_head, lse_row, k_page, k_head, k_token, v_page, v_head,
    v_token, magic, K_ALIGN: tl.constexpr, V_ALIGN: tl.constexpr, SCALE: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, SHARING: tl.constexpr, TAKEN: tl.constexpr, HEADS: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, BY_DOT: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (SHARING + TAKEN - 1) // TAKEN
    pair, split = tl.program_id(0) // chunks, tl.program_id(1)
    row, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    nth = tl.arange(0, HEADS)
    head = tl.program_id(0) % chunks * TAKEN + nth
    is_head = (nth < TAKEN) & (head < SHARING)
    head += kv_head * SHARING
    low_dim, high_dim, is_dim = _dims(D, WIDTH, BITS, GROUP)
    inside = is_head[:, None] & is_dim[None, :]
    query = q + row * q_row + head[:, None] * q_head
    q_low = tl.load(query + low_dim[None, :], mask=inside, other=0.0)
    q_high = q_low
    if BITS == 4:
        q_high = tl.load(query + high_dim[None, :], mask=inside, other=0.0)
    q_low, q_high = _as_operand(q_low, BY_DOT), _as_operand(q_high, BY_DOT)
    top, total, low, high = _nothing(HEADS, TILE, WIDTH, BITS, BY_DOT)
    length = tl.load(lens + row)
    begin = tl.maximum(length - window, 0)
    first = begin // PAGE * PAGE
    share = tl.cdiv(tl.cdiv(length - first, splits), TILE) * TILE
    first += split * share
    end = tl.minimum(first + share, length)
    k_head, v_head = kv_head.to(tl.int64) * k_head, kv_head.to(tl.int64) * v_head
    table = tables + row * table_row
    page = _pages(table, first, end, TILE, PAGE)
    for start in tl.range(first, end, TILE):
        # A tile ahead, so that vectors wait for no page number.
        following = _pages(table, start + TILE, end, TILE, PAGE)
        token = start + tl.arange(0, TILE)
        live = (token >= begin) & (token < end)
        if not BY_DOT:
            # A dimension for heads, of which the loads choose the layout.
            live = live[None, :]
        place = _places(page * k_page + k_head, k_token, TILE, PAGE, K_ALIGN, BY_DOT)
        kind = q.dtype.element_ty
        k_low, k_high = _vectors(keys, place, live, kind, D, WIDTH, BITS, GROUP, GROUPS, magic)
        place = _places(page * v_page + v_head, v_token, TILE, PAGE, V_ALIGN, BY_DOT)
        v_low, v_high = _vectors(values, place, live, kind, D, WIDTH, BITS, GROUP, GROUPS, magic)
        if BY_DOT:
            top, total, low, high = _add_by_dot(
                top, total, low, high, q_low, q_high, k_low, k_high, v_low, v_high, live,
                SCALE, BITS,
            )  # fmt: skip
        else:
            top, total, low, high = _add_by_sum(
                top, total, low, high, q_low, q_high, k_low, k_high, v_low, v_high, live,
                SCALE, BITS,
            )  # fmt: skip
        page = following
    top, total, low, high = _by_head(top, total, low, high, BITS, BY_DOT)
    if parts is None:
        factor, log_sum = _close(top, total, sinks, head, is_head, length)
        if lse is not None:
            tl.store(lse + row * lse_row + head, log_sum, mask=is_head)
        target = out + row * out_row + head[:, None] * out_head
        low, high = low * factor[:, None], high * factor[:, None]
    else:
        slot = (split.to(tl.int64) * rows + row) * (kv_heads * SHARING) + head
        tl.store(ends + slot * 2, top, mask=is_head)
        tl.store(ends + slot * 2 + 1, total, mask=is_head)
        target = parts + slot[:, None] * D
        # A sum of no token is neither written nor read.
        inside &= (total != 0)[:, None]
    tl.store(target + low_dim[None, :], low.to(target.dtype.element_ty), mask=inside)
    if BITS == 4:
        tl.store(target + high_dim[None, :], high.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _dims(D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Dimensions in a tile's columns, and which columns have one.

    A byte with two values of 4 bits has dimensions half a group apart.
    """
    column = tl.arange(0, WIDTH)
    low, high, is_dim = column, column, column < D
    if BITS == 4:
        half: tl.constexpr = GROUP // 2
        group = column // half
        low = group * GROUP + column % half
        high = low + tl.minimum(D - group * GROUP, GROUP) // 2
        is_dim = column < D // 2
    return low, high, is_dim


@triton.jit
def _as_operand(query, BY_DOT: tl.constexpr):
    """Queries [heads, columns] as the products take them."""
    if BY_DOT:
        query = tl.trans(query)
    else:
        query = query.to(tl.float32)
    return query


@triton.jit
def _nothing(
    HEADS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    BY_DOT: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and weighted sums of no token.

    By dot those are of heads, [heads] and [columns, heads]; by sum every place of a tile has its
    own, [heads, places] and [heads, places, columns], so that no tile waits for another warp.
    """
    if BY_DOT:
        top = tl.full((HEADS,), float("-inf"), tl.float32)
        low = tl.zeros((WIDTH, HEADS), tl.float32)
    else:
        top = tl.full((HEADS, TILE), float("-inf"), tl.float32)
        low = tl.zeros((HEADS, TILE, WIDTH), tl.float32)
    return top, tl.zeros_like(top), low, tl.zeros_like(low)


@triton.jit
def _pages(table, start, end, TILE: tl.constexpr, PAGE: tl.constexpr):
    """Pages of the tokens from start, a multiple of PAGE, and before end; 0 for none."""
    number = start // PAGE + tl.arange(0, TILE // PAGE)
    return tl.load(table + number, mask=number * PAGE < end, other=0).to(tl.int64)


@triton.jit
def _places(
    page, step, TILE: tl.constexpr, PAGE: tl.constexpr, ALIGN: tl.constexpr, BY_DOT: tl.constexpr
):
    """Offsets of a tile's vectors, [TILE] or [1, TILE], from those of its pages.

    step: from token to token.
    """
    place = page[:, None] + (tl.arange(0, PAGE) * step)[None, :]
    # Said twice, since the compiler drops a reshape of one page, and with it what is said of it.
    place = tl.multiple_of(place, (ALIGN, ALIGN))
    if BY_DOT:
        place = tl.multiple_of(tl.reshape(place, (TILE,)), ALIGN)
    else:
        place = tl.multiple_of(tl.reshape(place, (1, TILE)), (ALIGN, ALIGN))
    return place


@triton.jit
def _vectors(
    pool, place, live, KIND: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, magic,
):  # fmt: skip
    """Vectors [..., columns] at offsets [...] in a pool, zero where a token isn't live.

    Twice the vectors, or with 4 bits the values in low nibbles and those in high ones.
    """
    if BITS:
        low, high = _unpacked(pool, place, live, KIND, D, WIDTH, BITS, GROUP, GROUPS, magic)
    else:
        column = tl.arange(0, WIDTH)
        inside = tl.expand_dims(live, -1)
        if D != WIDTH:
            inside = inside & (column < D)
        low = tl.load(pool + (tl.expand_dims(place, -1) + column), mask=inside, other=0.0)
        high = low
    return low, high


@triton.jit
def _unpacked(
    pool, place, live, KIND: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, magic,
):  # fmt: skip
    """Packed vectors as _vectors returns them; codes are taken from words of 32 bits."""
    size: tl.constexpr = D * BITS // 8
    is_live, start = tl.expand_dims(live, -1), pool + tl.expand_dims(place, -1)
    nth, group = tl.arange(0, WIDTH // 4), tl.arange(0, GROUPS)
    has_word = is_live
    if size != WIDTH:
        has_word = has_word & (nth * 4 < size)
    word = tl.load(start.to(tl.pointer_type(tl.uint32)) + nth, mask=has_word, other=0)
    pairs = (start + size).to(tl.pointer_type(tl.uint32)) + group
    pair = tl.load(pairs, mask=is_live & (group * GROUP < D), other=0)
    minimum = tl.expand_dims(_float_of_half(pair & 0xFFFF), -1)
    scale = tl.expand_dims(_float_of_half(pair >> 16), -1)
    word = tl.reshape(word, pair.shape + [WIDTH // GROUPS // 4])
    low = _values(word, minimum, scale, 0, KIND, BITS, magic)
    low = tl.reshape(low, place.shape + [WIDTH])
    high = low
    if BITS == 4:
        high = _values(word, minimum, scale, 4, KIND, BITS, magic)
        high = tl.reshape(high, place.shape + [WIDTH])
    if size != WIDTH:
        # Beyond a vector's end lies its last group's minimum, which may be infinite.
        inside = is_live & (tl.arange(0, WIDTH) < size)
        low, high = tl.where(inside, low, 0.0), tl.where(inside, high, 0.0)
    return low, high


@triton.jit
def _values(
    word,
    minimum,
    scale,
    SHIFT: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    magic,
):
    """One value of each byte of words, [..., words, 2, 2]; SHIFT: bits below it in the byte."""
    odd = tl.join(
        _value(word, minimum, scale, SHIFT + 8, KIND, BITS, magic),
        _value(word >> 16, minimum, scale, SHIFT + 8, KIND, BITS, magic),
    )
    even = tl.join(
        _value(word, minimum, scale, SHIFT, KIND, BITS, magic),
        _value(word >> 16, minimum, scale, SHIFT, KIND, BITS, magic),
    )
    return tl.join(even, odd)


@triton.jit
def _value(
    word,
    minimum,
    scale,
    SHIFT: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    magic,
):
    """Values of the codes SHIFT bits up in words.

    A code isn't shifted down, nor converted: its multiple is put into a float's own bits, and the
    scale is a fraction. Both are exact, and so is their product.
    """
    multiple: tl.constexpr = 1 << SHIFT
    code = (word & ((2**BITS - 1) * multiple)) | magic
    code = code.to(tl.float32, bitcast=True) - 8388608.0
    return (minimum + code * (scale * (1.0 / multiple))).to(KIND)


@triton.jit
def _finite(top):
    """Largest scores, or 0 in place of that of no token, by which scores can be reduced."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _add_by_dot(
    top, total, low, high, q_low, q_high, k_low, k_high, v_low, v_high, live,
    SCALE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Sums of heads with a tile's tokens added, by tensor cores."""
    scores = tl.dot(k_low, q_low)
    if BITS == 4:
        scores = tl.dot(k_high, q_high, scores)
    scores = tl.where(live[:, None], scores * SCALE, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 0))
    by = _finite(new)
    weights = tl.exp2(scores - by[None, :])
    factor = tl.exp2(top - by)
    total = total * factor + tl.sum(weights, 0)
    weights = weights.to(v_low.dtype)
    low = tl.dot(tl.trans(v_low), weights, low * factor[None, :])
    if BITS == 4:
        high = tl.dot(tl.trans(v_high), weights, high * factor[None, :])
    return new, total, low, high


@triton.jit
def _add_by_sum(
    top, total, low, high, q_low, q_high, k_low, k_high, v_low, v_high, live,
    SCALE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Sums of heads and places with a tile's tokens added, in float32."""
    products = k_low.to(tl.float32) * q_low[:, None, :]
    if BITS == 4:
        products += k_high.to(tl.float32) * q_high[:, None, :]
    scores = tl.sum(products, 2)
    scores = tl.where(live, scores * SCALE, float("-inf"))
    new = tl.maximum(top, scores)
    by = _finite(new)
    weights = tl.exp2(scores - by)
    factor = tl.exp2(top - by)
    total = total * factor + weights
    weights, factor = weights[:, :, None], factor[:, :, None]
    low = low * factor + weights * v_low.to(tl.float32)
    if BITS == 4:
        high = high * factor + weights * v_high.to(tl.float32)
    return new, total, low, high


@triton.jit
def _by_head(top, total, low, high, BITS: tl.constexpr, BY_DOT: tl.constexpr):
    """Largest score, sum of weights [heads], and weighted sums [heads, columns]."""
    if BY_DOT:
        low, high = tl.trans(low), tl.trans(high)
    else:
        peak = tl.max(top, 1)
        factor = tl.exp2(top - _finite(peak)[:, None])
        top, total = peak, tl.sum(total * factor, 1)
        low, high = tl.sum(low * factor[:, :, None], 1), tl.sum(high * factor[:, :, None], 1)
    return top, total, low, high


@triton.jit
def _close(top, total, sinks, head, is_head, length):
    """Factor of weighted sums, and natural logarithm of the softmax's denominator.

    A row without tokens has the factor 0; one whose scores are all -infinity gets NaN.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    factor = tl.full(top.shape, 1.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=is_head, other=float("-inf")) * LOG2E
        peak = tl.maximum(top, sink)
        factor = tl.exp2(top - _finite(peak))
        total = total * factor + tl.exp2(sink - _finite(peak))
        top = peak
    return tl.where(length > 0, factor / total, 0.0), (top + tl.log2(total)) / LOG2E


@triton.jit(do_not_specialize=("rows", "heads", "splits", "out_row", "out_head", "lse_row"))
def _merge(
    parts, ends, lens, out, lse, sinks, rows, heads, splits, out_row, out_head, lse_row,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge one head's partial results of one row; its sink joins here."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads + tl.arange(0, 1)
    split = tl.arange(0, SPLITS)
    slot = (split.to(tl.int64) * rows + row) * heads + tl.program_id(0) % heads
    top = tl.load(ends + slot * 2, mask=split < splits, other=float("-inf"))
    total = tl.load(ends + slot * 2 + 1, mask=split < splits, other=0.0)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (total != 0)[:, None] & (column < D)
    x = tl.load(parts + slot[:, None] * D + column, mask=inside, other=0.0)
    peak = tl.max(top[None, :], 1)
    weights = tl.exp2(top[None, :] - _finite(peak)[:, None])
    x = tl.sum(x[None] * weights[:, :, None], 1)
    total = tl.sum(total[None, :] * weights, 1)
    factor, log_sum = _close(peak, total, sinks, head, head < heads, tl.load(lens + row))
    if lse is not None:
        tl.store(lse + row * lse_row + head, log_sum, mask=head < heads)
    target = out + row * out_row + head[:, None] * out_head + column
    tl.store(target, (x * factor[:, None]).to(out.dtype.element_ty), mask=column < D)
