"""Attention of new tokens to a cache in host memory, at the speed its bytes can be read.

Keys and values are read once, as they are stored, however many query heads share them; arithmetic
is float32 with an online softmax over blocks of tokens (Milakov and Gimelshein, 2018). Each (row,
KV head) is the work of one thread, so results don't depend on the number of threads, nor on which
rows are attended together. Knows no tiers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from torch import Tensor

# numba's cache heeds changes of this file only: touch it when these two change.
from flexgen_ray.models.host_tiles import (
    COLUMNS_OF_FOUR_HEADS,
    KEYS_AT_ONCE,
    bits_of,
    compiled,
    largest_of,
    load_element,
    mix_tile,
    score_tile,
    size_of,
    store_element,
    take_next,
)
from flexgen_ray.models.host_vectors import KINDS, LANES

# A block's keys and values stay in the cache nearest to a core while further heads read them.
_BLOCK_TOKENS = 64
_ALONE_BYTES = 256 * 1024
_LOG2_E = 1.4426950408889634
# Added and subtracted, it rounds a float32 to a whole number, which lies in its low bits between.
_ROUNDER = np.float32(1.5 * 2**23)

_score_4 = score_tile(4, KEYS_AT_ONCE)
_score_4_last = score_tile(4, 1)
_score_1 = score_tile(1, 4)
_score_1_last = score_tile(1, 1)
_mix_4 = mix_tile(4, COLUMNS_OF_FOUR_HEADS)
_mix_4_narrow = mix_tile(4, 1)
_mix_1_wide = mix_tile(1, 8)
_mix_1 = mix_tile(1, 4)
_mix_1_narrow = mix_tile(1, 1)


class HostAttention:
    """Attends on `threads` threads, of which the caller's is one."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), "host-attention")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lens: list[int], out: Tensor) -> None:
        """Attend one new token per row to its cache, into out.

        q, out: [rows, heads, head_dim]; k, v: [rows, kv_heads, seq, head_dim]; all of one dtype
        (float32, float16, bfloat16), in host memory, with any strides but a dense head_dim.
        lens: valid tokens of each row, the new one included; nothing beyond them is read.
        Raises ValueError if the tensors don't fit together.
        """
        _check(q, k, v, lens, out)
        kind, size = KINDS[str(q.dtype).removeprefix("torch.")], q.element_size()
        rows, kv_heads, _, head_dim = k.shape
        shape = (rows, kv_heads, q.shape[1] // kv_heads, head_dim)
        q_place, k_place, v_place, out_place = (
            (x.data_ptr(), *(size * stride for stride in x.stride()[:-1])) for x in (q, k, v, out)
        )
        counter, ends = np.zeros(1, np.int64), np.array(lens, np.int64)
        task = (kind, counter, ends, shape, (q_place, out_place), (k_place, v_place))
        small = int(ends.sum()) * kv_heads * head_dim * 2 * size < _ALONE_BYTES
        helpers = 0 if small else min(self.threads, rows * kv_heads) - 1
        running = [self._pool.submit(_attend, *task) for _ in range(helpers)]
        try:
            _attend(*task)
        finally:
            for future in running:
                future.result()


def _check(q: Tensor, k: Tensor, v: Tensor, lens: list[int], out: Tensor) -> None:
    rows, heads, head_dim = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (rows, head_dim) or out.shape != q.shape:
        shapes = [tuple(x.shape) for x in (q, k, v, out)]
        raise ValueError(f"q, k, v and out don't fit together: {shapes}")
    if head_dim < LANES:
        raise ValueError(f"head_dim {head_dim} is below {LANES}, a vector of this CPU")
    if heads % k.shape[1]:
        raise ValueError(f"{heads} heads are not a multiple of {k.shape[1]} KV heads")
    if len(lens) != rows or min(lens) < 1 or max(lens) > k.shape[2]:
        raise ValueError(f"lens {lens} must be {rows} numbers from 1 to {k.shape[2]}")
    if any(x.dtype != q.dtype or x.stride(-1) != 1 for x in (q, k, v, out)):
        raise ValueError("q, k, v and out must have one dtype and a dense head_dim")


@numba.njit(nogil=True)
def _at(matrix, row, offset):
    """The matrix from a row and a byte offset on."""
    return matrix[0] + row * matrix[1] + offset, matrix[1]


@numba.njit(nogil=True)
def _score(kind, shape, queries, keys, scores, ahead):
    """scores[heads, count] = queries @ keys^T; shape: (heads, count, head_dim).

    ahead: the rows that are read next.
    """
    heads, count, dim = shape
    fours = heads - heads % 4
    for h in range(0, fours, 4):
        q, j = _at(queries, h, 0), 0
        while j < count:
            k, s, n = _at(keys, j, 0), _at(scores, h, 4 * j), _at(ahead, j, 0)
            if j + KEYS_AT_ONCE <= count:
                _score_4(kind, dim, q, k, s, n)
                j += KEYS_AT_ONCE
            else:
                _score_4_last(kind, dim, q, k, s, n)
                j += 1
    for h in range(fours, heads):
        q, j = _at(queries, h, 0), 0
        while j < count:
            k, s, n = _at(keys, j, 0), _at(scores, h, 4 * j), _at(ahead, j, 0)
            if j + 4 <= count:
                _score_1(kind, dim, q, k, s, n)
                j += 4
            else:
                _score_1_last(kind, dim, q, k, s, n)
                j += 1


@numba.njit(nogil=True)
def _mix(kind, shape, weights, values, sums, ahead):
    """sums[heads, head_dim] += weights[heads, count] @ values; shape as in _score."""
    heads, count, dim = shape
    size, fours, last = size_of(kind), heads - heads % 4, dim - LANES
    for h in range(0, fours, 4):
        w, d = _at(weights, h, 0), 0
        while d < dim:
            at = min(d, last) * size
            v, a, n = _at(values, 0, at), _at(sums, h, 4 * d), _at(ahead, 0, at)
            if d + COLUMNS_OF_FOUR_HEADS * LANES <= dim:
                _mix_4(kind, count, w, v, a, n)
                d += COLUMNS_OF_FOUR_HEADS * LANES
            else:
                _mix_4_narrow(kind, count, w, v, a, n)
                d += LANES
    for h in range(fours, heads):
        w, d = _at(weights, h, 0), 0
        while d < dim:
            at = min(d, last) * size
            v, a, n = _at(values, 0, at), _at(sums, h, 4 * d), _at(ahead, 0, at)
            if d + 8 * LANES <= dim:
                _mix_1_wide(kind, count, w, v, a, n)
                d += 8 * LANES
            elif d + 4 * LANES <= dim:
                _mix_1(kind, count, w, v, a, n)
                d += 4 * LANES
            else:
                _mix_1_narrow(kind, count, w, v, a, n)
                d += LANES


@numba.njit(nogil=True, fastmath={"contract"})
def _exp2(x):
    """2**x for x <= 0, within two units in the last place; vectorises, unlike math.exp2."""
    x = max(x, np.float32(-126))
    shifted = x + _ROUNDER
    f = x - (shifted - _ROUNDER)
    y = np.float32(1.535336188319500e-4)
    y = y * f + np.float32(1.339887440266574e-3)
    y = y * f + np.float32(9.618437357674640e-3)
    y = y * f + np.float32(5.550332471162809e-2)
    y = y * f + np.float32(2.402264791363012e-1)
    y = y * f + np.float32(6.931472028550421e-1)
    y = y * f + np.float32(1)
    exponent = (bits_of(shifted) << np.int32(23)) + np.int32(0x3F800000)
    return y * bits_of(np.int32(exponent))


@numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _exponentiate(scores, largest):
    """scores become 2**(score - largest); returns their sum."""
    total = np.float32(0)
    for j in range(scores.size):
        scores[j] = _exp2(scores[j] - largest)
        total += scores[j]
    return total


@numba.njit(nogil=True, fastmath={"contract"})
def _attend_one(kind, end, matrices, scratch):
    """One KV head of a row: sums and totals from its queries; matrices: (keys, values)."""
    queries, scores, sums, totals, dim = scratch
    heads, largest = queries.shape[0], np.full(queries.shape[0], -np.inf, np.float32)
    sums[:], totals[:] = 0, 0
    q, w = (queries.ctypes.data, queries.strides[0]), (scores.ctypes.data, scores.strides[0])
    a = (sums.ctypes.data, sums.strides[0])
    for first in range(0, end, _BLOCK_TOKENS):
        count = min(_BLOCK_TOKENS, end - first)
        shape = (heads, count, dim)
        keys, values = _at(matrices[0], first, 0), _at(matrices[1], first, 0)
        _score(kind, shape, q, keys, w, values)
        scores[:, count:] = -np.inf
        for h in range(heads):
            new = max(largest[h], largest_of(w[0] + h * w[1], _BLOCK_TOKENS))
            shrink = _exp2(largest[h] - new)
            largest[h] = new
            totals[h] = totals[h] * shrink + _exponentiate(scores[h], new)
            if shrink != 1:
                sums[h] *= shrink
        _mix(kind, shape, w, values, a, _at(keys, _BLOCK_TOKENS, 0))


@numba.njit(nogil=True)
def _place(d, dim):
    """Where element d lies in the scratch, whose last vector holds a row's last LANES elements."""
    whole = dim - dim % LANES
    return d if d < whole else d + LANES - dim % LANES


@compiled
def _attend(kind, counter, ends, shape, vectors, caches):
    """Takes (row, KV head) after (row, KV head) until none is left."""
    rows, kv_heads, heads, dim = shape
    padded = -(-dim // LANES) * LANES
    queries, sums = np.zeros((heads, padded), np.float32), np.empty((heads, padded), np.float32)
    scores, totals = np.empty((heads, _BLOCK_TOKENS), np.float32), np.empty(heads, np.float32)
    scale, size = np.float32(_LOG2_E / np.sqrt(dim)), size_of(kind)
    (q, q_row, q_head), (out, out_row, out_head) = vectors
    (k, k_row, k_head, k_token), (v, v_row, v_head, v_token) = caches
    item = take_next(counter.ctypes.data)
    while item < rows * kv_heads:
        row, head = item // kv_heads, item % kv_heads
        for h in range(heads):
            start = q + row * q_row + (head * heads + h) * q_head
            for d in range(dim):
                queries[h, _place(d, dim)] = load_element(kind, start + d * size) * scale
        keys = (k + row * k_row + head * k_head, k_token)
        values = (v + row * v_row + head * v_head, v_token)
        _attend_one(kind, ends[row], (keys, values), (queries, scores, sums, totals, dim))
        for h in range(heads):
            start = out + row * out_row + (head * heads + h) * out_head
            for d in range(dim):
                store_element(kind, start + d * size, sums[h, _place(d, dim)] / totals[h])
        item = take_next(counter.ctypes.data)
