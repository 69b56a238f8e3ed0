"""Attention of new tokens to a cache in host memory, at the speed its bytes can be read.

Keys and values are read once, as they are stored, packed or not, however many query heads share
them; arithmetic is float32 with an online softmax over blocks of tokens (Milakov and Gimelshein,
2018). Each (row, KV head) is the work of one thread, so results don't depend on the number of
threads, nor on which rows are attended together. Knows no tiers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numba.core import types
from torch import Tensor

from flexgen_ray.models.attention import cache_bits
from flexgen_ray.models.host_rows import DTYPES, collect, order, spread
from flexgen_ray.models.host_scores import score, score_alone
from flexgen_ray.models.host_tiles import BLOCK, TILES, begin, give, mix, soften
from flexgen_ray.models.host_vectors import I64, KINDS, LANES, PACKED_KINDS, emitted
from flexgen_ray.quant.packing import code_bytes

# numba's cache heeds changes of this file only, so it names the state of those four (a test says).
_PARTS = "484f3000"

_ALONE_BYTES = 256 * 1024
_LOG2_E = 1.4426950408889634


class HostAttention:
    """Attends on `threads` threads, of which the caller's is one."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), "host-attention")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lens: list[int], out: Tensor) -> None:
        """Attend one new token per row to its cache, into out.

        q, out: [rows, heads, head_dim], float32, float16 or bfloat16.
        k, v: [rows, kv_heads, seq, head_dim] of the same dtype; or packed into 4 or 8 bits, uint8
        [rows, kv_heads, seq, packed_bytes(head_dim, bits)]. All in host memory, with any strides
        but a dense last dimension.
        lens: valid tokens of each row, the new one included; nothing beyond them is read.
        Raises ValueError if the tensors don't fit together.
        """
        bits = _check(q, k, v, lens, out)
        (rows, heads, head_dim), kv_heads = q.shape, k.shape[1]
        dtype = str(q.dtype).removeprefix("torch.")
        kind, lanes, nbytes = KINDS[dtype], None, k[0, 0, 0].nbytes
        if bits:
            kind, lanes = PACKED_KINDS[bits], order(head_dim, bits)
            nbytes = code_bytes(head_dim, bits)
        shape = (rows, kv_heads, heads // kv_heads, head_dim, nbytes)
        places = tuple(
            (x.data_ptr(), *(x.element_size() * stride for stride in x.stride()[:-1]))
            for x in (q, out, k, v)
        )
        padded = -(-head_dim // LANES) * LANES if lanes is None else len(lanes)
        counter, ends = np.zeros(1, np.int64), np.array(lens, np.int64)
        task = (kind, counter, ends, shape, DTYPES[dtype], lanes, places[:2], places[2:])
        small = 2 * int(ends.sum()) * kv_heads * nbytes < _ALONE_BYTES
        helpers = 0 if small else min(self.threads, rows * kv_heads) - 1
        own, *others = (_scratch(shape[2], padded) for _ in range(helpers + 1))
        running = [self._pool.submit(_attend, *task, other.ctypes.data) for other in others]
        try:
            _attend(*task, own.ctypes.data)
        finally:
            for future in running:
                future.result()


def _check(q: Tensor, k: Tensor, v: Tensor, lens: list[int], out: Tensor) -> int | None:
    """The bits that each value of the cache is packed into, if it is."""
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


@numba.njit(nogil=True)
def _at(matrix, row):
    """The matrix from a row on."""
    return matrix[0] + row * matrix[1], matrix[1]


@numba.njit(nogil=True)
def _tile(head, heads, padded, memory):
    """The tile from a head on: its heads, and where its queries, scores, sums and state lie."""
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
    """Scratch for a head's queries, scores and sums, and for a tile's state if it is alone."""
    return 2 * padded + BLOCK + 2 * LANES


@numba.njit(nogil=True)
def _score(kind, shape, memory, rows, ahead):
    """A block's scores for all heads; shape: (heads, tokens, nbytes, padded)."""
    heads, tokens, nbytes, padded = shape
    scratch = memory + 4 * heads * _floats_per_head(padded)
    h = 0
    while h < heads:
        n, q, w, _, _ = _tile(h, heads, padded, memory)
        if n == 1:
            for first in range(0, tokens, LANES):
                count = min(LANES, tokens - first)
                score_alone(kind, count, nbytes, q, _at(rows, first), scratch, w + 4 * first)
        else:
            score(kind, n, (tokens, nbytes), q, rows, w, ahead)
        h += n


@numba.njit(nogil=True)
def _attend_one(kind, end, caches, shape, memory):
    """One KV head of a row: every tile's sums and state; caches: (keys, values)."""
    heads, nbytes, padded = shape
    for first in range(0, end, BLOCK):
        tokens = min(BLOCK, end - first)
        keys, values = _at(caches[0], first), _at(caches[1], first)
        _score(kind, (heads, tokens, nbytes, padded), memory, keys, values)
        h = 0
        while h < heads:
            n, _, scores, sums, state = _tile(h, heads, padded, memory)
            soften(n, tokens, padded, scores, sums, state)
            mix(kind, n, (tokens, nbytes), scores, values, sums, _at(keys, BLOCK))
            h += n


def _compiled(function: Callable) -> Callable:
    """Compiled at its first call without the GIL, and kept for later runs where that can be."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that can be written to
        return numba.njit(nogil=True)(function)


@emitted
def _take_next(context, address):
    """Atomically adds one to the int64 at the address; returns what was there."""

    def generate(context, b, signature, args):
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, I64(1), "monotonic")

    return types.int64(types.int64), generate


@numba.njit(nogil=True)
def _begin(kind, n, dim, scale, rows, lanes, dtype, place, sums, state):
    """A tile's queries from their rows; lanes, dtype: as for _attend."""
    if lanes is None:
        begin(kind, n, dim, scale, rows, place, sums, state)
    else:
        for i in range(n):
            spread(dtype, _at(rows, i)[0], lanes.ctypes.data, len(lanes), _at(sums, i)[0])
        begin(np.float32(0), n, len(lanes), scale, sums, place, sums, state)


@numba.njit(nogil=True)
def _give(kind, n, dim, sums, state, lanes, dtype, rows):
    """A tile's results into their rows; lanes, dtype: as for _attend."""
    if lanes is None:
        give(kind, n, dim, sums, state, rows)
    else:
        give(np.float32(0), n, len(lanes), sums, state, sums)
        for i in range(n):
            collect(dtype, _at(sums, i)[0], lanes.ctypes.data, len(lanes), _at(rows, i)[0])


@_compiled
def _attend(kind, counter, ends, shape, dtype, lanes, vectors, caches, memory):
    """Takes (row, KV head) after (row, KV head) until none is left; memory: _scratch's address.

    lanes: the order of a packed row's elements, or else None; dtype: of queries and results.
    """
    rows, kv_heads, heads, dim, nbytes = shape
    padded = -(-dim // LANES) * LANES if lanes is None else len(lanes)
    scale = np.float32(_LOG2_E / np.sqrt(dim))
    (q, q_row, q_head), (out, out_row, out_head) = vectors
    (k, k_row, k_head, k_token), (v, v_row, v_head, v_token) = caches
    item = _take_next(counter.ctypes.data)
    while item < rows * kv_heads:
        row, head = item // kv_heads, item % kv_heads
        queries = (q + row * q_row + head * heads * q_head, q_head)
        results = (out + row * out_row + head * heads * out_head, out_head)
        keys = (k + row * k_row + head * k_head, k_token)
        values = (v + row * v_row + head * v_head, v_token)
        h = 0
        while h < heads:
            n, place, _, sums, state = _tile(h, heads, padded, memory)
            _begin(kind, n, dim, scale, _at(queries, h), lanes, dtype, place, sums, state)
            h += n
        _attend_one(kind, ends[row], (keys, values), (heads, nbytes, padded), memory)
        h = 0
        while h < heads:
            n, _, _, sums, state = _tile(h, heads, padded, memory)
            _give(kind, n, dim, sums, state, lanes, dtype, _at(results, h))
            h += n
        item = _take_next(counter.ctypes.data)


def _scratch(heads: int, padded: int) -> np.ndarray:
    """Zeros for one thread, from a line of the cache on, so that no vector lies in two lines."""
    floats = heads * _floats_per_head.py_func(padded) + LANES * LANES
    memory = np.zeros(floats + 16, np.float32)
    start = -(memory.ctypes.data // 4) % 16
    return memory[start : start + floats]
