"""Attention of new tokens to a cache in host memory, at the speed its bytes can be read.

Keys and values are read once, as they are stored, packed or not, however many query heads share
them; arithmetic is float32 with an online softmax over blocks of tokens (Milakov and Gimelshein,
2018). Each (row, KV head) is the work of one thread, so results don't depend on the number of
threads, nor on which rows are attended together. Knows no tiers.

The work on one (row, KV head), with the query heads that share it (host_tiles draws a tile):

    for every tile of its query heads: _start_tile      queries scaled, sums cleared
    for every BLOCK of cached tokens:  _attend_one
        for every tile: _score_block                    scores = keys @ queries
        for every tile: softmax_block, add_weighted_values
    for every tile: _store_tile                         results = sums / sum of weights

A block's keys and values come from memory for the first tile, and from the core's caches for the
others. Sparse attention (_attend_selected) scores all tokens first, selects those with the largest
weights, and then reads the values of these only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from flexgen_ray.config import kept_tokens
from flexgen_ray.kernels.attention import cache_bits
from flexgen_ray.kernels.host_rows import DTYPES, collect_result, lane_order, spread_query
from flexgen_ray.kernels.host_scores import score_heads, score_one_head
from flexgen_ray.kernels.host_sparse import add_softmax, copy_vectors, gather_scores, keep_largest
from flexgen_ray.kernels.host_tiles import (
    AHEAD,
    BLOCK,
    TILES,
    add_weighted_values,
    softmax_block,
    start_tile,
    store_results,
)
from flexgen_ray.kernels.vectors import KINDS, LANES, PACKED_KINDS, compiled, fetch_and_increment
from flexgen_ray.quant.packing import code_bytes

# Caches smaller than this are read faster by the caller than threads can be woken.
_ALONE_BYTES = 256 * 1024
_LOG2_E = 1.4426950408889634


class HostAttention:
    """Host attention on a number of threads, of which the caller's is one."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), "host-attention")

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lens: list[int],
        out: Tensor,
        sparsity: float = 1.0,
        window: int | None = None,
    ) -> None:
        """Attend one new token per row to its cache, into out.

        q, out: [rows, heads, head_dim], float32, float16 or bfloat16.
        k, v: [rows, kv_heads, seq, head_dim] of the same dtype; or quantized to 4 or 8 bits, uint8
        [rows, kv_heads, seq, packed_bytes(head_dim, bits)]. All in host memory, with any strides
        except that the last dimension is dense.
        lens: valid tokens of each row, the new one included; nothing beyond them is read.
        sparsity: share of tokens that are attended, those that attention.decode_sparse selects; no
        value of the others is read.
        window: number of a row's last tokens that are attended, None for all; nothing before them
        is read.
        Raises ValueError if the tensors don't fit together.
        """
        bits = _check(q, k, v, lens, out)
        starts = [0 if window is None else max(0, end - window) for end in lens]
        spans = [end - start for start, end in zip(starts, lens, strict=True)]
        counts = None
        if sparsity != 1:
            counts = np.array([kept_tokens(tokens, sparsity) for tokens in spans], np.int64)
        kind, dtype, lanes, shape = _describe(q, k, bits)
        places = tuple(
            (x.data_ptr(), *(x.element_size() * stride for stride in x.stride()[:-1]))
            for x in (q, out, k, v)
        )
        counter = np.zeros(1, np.int64)
        rows_of = np.array(starts, np.int64), np.array(spans, np.int64)
        task = (kind, dtype, lanes, shape, counter, *rows_of, counts, places[:2], places[2:])
        rows, kv_heads, heads, _, nbytes, padded = shape
        small = 2 * sum(spans) * kv_heads * nbytes < _ALONE_BYTES
        helpers = 0 if small else min(self.threads, rows * kv_heads) - 1
        room = None if counts is None else max(spans)
        own, *others = (_make_workspace(heads, padded, room) for _ in range(helpers + 1))
        running = [self._pool.submit(_attend, *task, *other) for other in others]
        try:
            _attend(*task, *own)
        finally:
            for future in running:
                future.result()


def _check(q: Tensor, k: Tensor, v: Tensor, lens: list[int], out: Tensor) -> int | None:
    """Bits of a quantized value of the cache, None if it isn't quantized; ValueError as above."""
    rows, heads, head_dim = q.shape
    bits = cache_bits(k, head_dim)
    fits = k.shape == v.shape and k.shape[0] == rows and out.shape == q.shape
    if not fits or (bits is None and k.shape[3] != head_dim):
        shapes = [tuple(x.shape) for x in (q, k, v, out)]
        raise ValueError(f"q, k, v and out don't fit together: {shapes}")
    if head_dim < LANES:
        raise ValueError(f"head_dim {head_dim} is below {LANES}, a vector of this CPU")
    if heads % k.shape[1]:
        raise ValueError(f"{heads} heads are not a multiple of {k.shape[1]} KV heads")
    if len(lens) != rows or min(lens) < 1 or max(lens) > k.shape[2]:
        raise ValueError(f"lens {lens} must be {rows} numbers from 1 to {k.shape[2]}")
    dtypes = [x.dtype for x in (q, out, k, v)]
    if dtypes != [q.dtype] * 2 + [torch.uint8 if bits else q.dtype] * 2:
        raise ValueError(f"q, out, k and v have dtypes that don't fit together: {dtypes}")
    if any(x.stride(-1) != 1 for x in (q, k, v, out)):
        raise ValueError("q, k, v and out must have a dense last dimension")
    return bits


def _describe(q: Tensor, k: Tensor, bits: int | None) -> tuple:
    """Arguments of _attend that describe queries and cache: kind, dtype, lanes and shape."""
    (rows, heads, head_dim), kv_heads = q.shape, k.shape[1]
    dtype = str(q.dtype).removeprefix("torch.")
    shape = (rows, kv_heads, heads // kv_heads, head_dim)
    if bits is None:
        padded = -(-head_dim // LANES) * LANES
        nbytes = head_dim * q.element_size()
        return KINDS[dtype], DTYPES[dtype], None, (*shape, nbytes, padded)
    lanes, nbytes = lane_order(head_dim, bits), code_bytes(head_dim, bits)
    return PACKED_KINDS[bits], DTYPES[dtype], lanes, (*shape, nbytes, len(lanes))


@numba.njit(nogil=True)
def _from(matrix, row):
    """Matrix that begins at a row."""
    return matrix[0] + row * matrix[1], matrix[1]


@numba.njit(nogil=True)
def _tile_at(head, heads, padded, memory):
    """Tile that begins at a head, as wide as the heads that are left allow.

    Returns its number of heads, the addresses of its queries and scores, the matrix of its sums,
    and the address of its state.
    """
    count = 1
    for count in TILES:
        if head + count <= heads:
            break
    queries = memory + 4 * head * _floats_per_head(padded)
    scores = queries + 4 * count * padded
    sums = scores + 4 * count * BLOCK
    return count, queries, scores, (sums, 4 * padded), sums + 4 * count * padded


@numba.njit(nogil=True)
def _floats_per_head(padded):
    """Workspace for one head's queries, scores and sums, and for the state of its tile."""
    return 2 * padded + BLOCK + 2 * LANES


@numba.njit(nogil=True)
def _score_block(kind, shape, memory, rows, ahead):
    """Scores of a block's tokens for all heads; shape: (heads, tokens, nbytes, padded).

    rows: matrix of the block's keys; ahead: matrix of the rows that are read next.
    """
    heads, tokens, nbytes, padded = shape
    scratch = memory + 4 * heads * _floats_per_head(padded)
    h = 0
    while h < heads:
        n, q, w, _, _ = _tile_at(h, heads, padded, memory)
        if n == 1:
            for first in range(0, tokens, LANES):
                count = min(LANES, tokens - first)
                score_one_head(kind, count, nbytes, q, _from(rows, first), scratch, w + 4 * first)
        else:
            score_heads(kind, n, (tokens, nbytes), q, rows, w, ahead)
        h += n


@numba.njit(nogil=True)
def _attend_one(kind, end, caches, shape, memory):
    """Attend `end` tokens of one KV head: sums and state of every tile.

    caches: matrices of (keys, values); shape: (heads, nbytes, padded).
    """
    heads, nbytes, padded = shape
    for first in range(0, end, BLOCK):
        tokens = min(BLOCK, end - first)
        keys, values = _from(caches[0], first), _from(caches[1], first)
        _score_block(kind, (heads, tokens, nbytes, padded), memory, keys, values)
        h = 0
        while h < heads:
            n, _, scores, sums, state = _tile_at(h, heads, padded, memory)
            softmax_block(n, tokens, padded, scores, sums, state)
            add_weighted_values(
                kind, n, (tokens, nbytes), scores, values, None, sums, _from(keys, BLOCK)
            )
            h += n


@numba.njit(nogil=True)
def _attend_selected(kind, end, count, caches, shape, memory, spare):
    """Attend the `count` heaviest of `end` tokens; as _attend_one otherwise.

    spare: workspace for sparse attention, from _make_workspace.
    """
    heads, nbytes, padded = shape
    scores, weights, selected = spare
    room = len(weights)
    for first in range(0, end, BLOCK):
        keys = _from(caches[0], first)
        tokens = min(BLOCK, end - first)
        _score_block(kind, (heads, tokens, nbytes, padded), memory, keys, _from(keys, BLOCK))
        h = 0
        while h < heads:
            n, _, block, _, _ = _tile_at(h, heads, padded, memory)
            copy_vectors(block, BLOCK * n // LANES, scores[h * room + first * n :].ctypes.data)
            h += n
    weights[:] = 0
    h = 0
    while h < heads:
        n = _tile_at(h, heads, padded, memory)[0]
        add_softmax(n, end, scores[h * room :].ctypes.data, weights.ctypes.data)
        h += n
    num_selected = keep_largest(weights, end, count, selected)
    if weights[0] != weights[0]:
        num_selected = 0  # a score is NaN, and so must the result be: without tokens it is 0 / 0
    for first in range(0, num_selected, BLOCK):
        picks = selected[first : min(first + BLOCK, num_selected)]
        h = 0
        while h < heads:
            n, _, block, sums, state = _tile_at(h, heads, padded, memory)
            gather_scores(scores[h * room :], n, picks, block)
            softmax_block(n, len(picks), padded, block, sums, state)
            add_weighted_values(
                kind, n, (len(picks), nbytes), block, caches[1], picks.ctypes.data, sums, caches[1]
            )
            h += n


@numba.njit(nogil=True)
def _start_tile(kind, n, dim, scale, rows, lanes, dtype, place, sums, state):
    """Prepare a tile's queries from rows; lanes, dtype: as for _attend."""
    if lanes is None:
        start_tile(kind, n, dim, scale, rows, place, sums, state)
    else:
        for i in range(n):
            spread_query(dtype, _from(rows, i)[0], lanes.ctypes.data, len(lanes), _from(sums, i)[0])
        start_tile(kind, n, len(lanes), scale, sums, place, sums, state)


@numba.njit(nogil=True)
def _store_tile(kind, n, dim, sums, state, lanes, dtype, rows):
    """Write a tile's results into rows; lanes, dtype: as for _attend."""
    if lanes is None:
        store_results(kind, n, dim, sums, state, rows)
    else:
        store_results(np.float32(0), n, len(lanes), sums, state, sums)
        for i in range(n):
            collect_result(
                dtype, _from(sums, i)[0], lanes.ctypes.data, len(lanes), _from(rows, i)[0]
            )


@compiled
def _attend(
    kind, dtype, lanes, shape, counter, starts, spans, counts, vectors, caches, memory, spare
):
    """Takes (row, KV head) after (row, KV head) until none is left.

    dtype: of queries and results. lanes: the lane_order of a packed row's elements, or else None.
    shape: rows, KV heads, heads of each, head_dim, bytes of a row, its vectors' lanes.
    starts, spans: of each row the first token that counts, and how many do; counts: how many of
    these are kept, or None; memory, spare: _scratch's.
    """
    rows, kv_heads, heads, dim, nbytes, padded = shape
    memory = memory.ctypes.data
    scale = np.float32(_LOG2_E / np.sqrt(dim))
    (q, q_row, q_head), (out, out_row, out_head) = vectors
    (k, k_row, k_head, k_token), (v, v_row, v_head, v_token) = caches
    item = fetch_and_increment(counter.ctypes.data)
    while item < rows * kv_heads:
        row, head = item // kv_heads, item % kv_heads
        queries = (q + row * q_row + head * heads * q_head, q_head)
        results = (out + row * out_row + head * heads * out_head, out_head)
        keys = _from((k + row * k_row + head * k_head, k_token), starts[row])
        values = _from((v + row * v_row + head * v_head, v_token), starts[row])
        h = 0
        while h < heads:
            n, place, _, sums, state = _tile_at(h, heads, padded, memory)
            _start_tile(kind, n, dim, scale, _from(queries, h), lanes, dtype, place, sums, state)
            h += n
        if counts is None:
            _attend_one(kind, spans[row], (keys, values), (heads, nbytes, padded), memory)
        else:
            sizes = (heads, nbytes, padded)
            _attend_selected(kind, spans[row], counts[row], (keys, values), sizes, memory, spare)
        h = 0
        while h < heads:
            n, _, _, sums, state = _tile_at(h, heads, padded, memory)
            _store_tile(kind, n, dim, sums, state, lanes, dtype, _from(results, h))
            h += n
        item = fetch_and_increment(counter.ctypes.data)


def _make_workspace(heads: int, padded: int, tokens: int | None) -> tuple:
    """Workspace of one thread, zeros: (memory, spare) as for _attend.

    memory starts at a cache line, so that no vector lies in two lines. spare, only for sparse
    attention: scores, weights and positions of a number of tokens.
    """
    floats = heads * _floats_per_head.py_func(padded) + LANES * LANES
    memory = np.zeros(floats + 16, np.float32)
    start = -(memory.ctypes.data // 4) % 16
    memory = memory[start : start + floats]
    if tokens is None:
        return memory, None
    room = -(-tokens // BLOCK) * BLOCK
    scores, weights = np.zeros(heads * room, np.float32), np.zeros(room, np.float32)
    return memory, (scores, weights, np.zeros(room + AHEAD, np.int64))
