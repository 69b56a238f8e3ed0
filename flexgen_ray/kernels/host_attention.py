"""Attention of new tokens to a cache in host memory, at the speed its bytes can be read.

Keys and values are read once, as they are stored, packed or not, however many query heads share
them; arithmetic is float32 with an online softmax over blocks of tokens (Milakov and Gimelshein,
2018). Each (row, KV head) is the work of one thread, so results don't depend on the number of
threads, nor on which rows are attended together. Knows no tiers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from flexgen_ray.config import kept_tokens
from flexgen_ray.kernels.attention import cache_bits
from flexgen_ray.kernels.host_rows import DTYPES, collect, order, spread
from flexgen_ray.kernels.host_scores import score, score_alone
from flexgen_ray.kernels.host_sparse import gather, keep, move, weigh
from flexgen_ray.kernels.host_tiles import AHEAD, BLOCK, TILES, begin, give, mix, soften
from flexgen_ray.kernels.vectors import KINDS, LANES, PACKED_KINDS, compiled, take_next
from flexgen_ray.quant.packing import code_bytes

# numba's cache heeds changes of this file only, so it names the state of those five (a test says).
_PARTS = "b38b0fb3"

_ALONE_BYTES = 256 * 1024
_LOG2_E = 1.4426950408889634


class HostAttention:
    """Attends on `threads` threads, of which the caller's is one."""

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
        k, v: [rows, kv_heads, seq, head_dim] of the same dtype; or packed into 4 or 8 bits, uint8
        [rows, kv_heads, seq, packed_bytes(head_dim, bits)]. All in host memory, with any strides
        but a dense last dimension.
        lens: valid tokens of each row, the new one included; nothing beyond them is read.
        sparsity: the share of tokens that are attended, those of attention.decode_sparse; of the
        others no value is read. window: how many of a row's tokens count, the last ones, if not
        all; nothing before them is read.
        Raises ValueError if the tensors don't fit together.
        """
        bits = _check(q, k, v, lens, out)
        starts = [0 if window is None else max(0, end - window) for end in lens]
        spans = [end - start for start, end in zip(starts, lens, strict=True)]
        counts = None
        if sparsity != 1:
            counts = np.array([kept_tokens(tokens, sparsity) for tokens in spans], np.int64)
        kind, dtype, lanes, shape = _form(q, k, bits)
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
        own, *others = (_scratch(heads, padded, room) for _ in range(helpers + 1))
        running = [self._pool.submit(_attend, *task, *other) for other in others]
        try:
            _attend(*task, *own)
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


def _form(q: Tensor, k: Tensor, bits: int | None) -> tuple:
    """How the kernel sees a cache: kind, dtype, lanes and shape, as for _attend."""
    (rows, heads, head_dim), kv_heads = q.shape, k.shape[1]
    dtype = str(q.dtype).removeprefix("torch.")
    shape = (rows, kv_heads, heads // kv_heads, head_dim)
    if bits is None:
        padded = -(-head_dim // LANES) * LANES
        nbytes = head_dim * q.element_size()
        return KINDS[dtype], DTYPES[dtype], None, (*shape, nbytes, padded)
    lanes, nbytes = order(head_dim, bits), code_bytes(head_dim, bits)
    return PACKED_KINDS[bits], DTYPES[dtype], lanes, (*shape, nbytes, len(lanes))


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
            mix(kind, n, (tokens, nbytes), scores, values, None, sums, _at(keys, BLOCK))
            h += n


@numba.njit(nogil=True)
def _attend_kept(kind, end, count, caches, shape, memory, spare):
    """As _attend_one, but no more tokens than the count; spare: as for _attend."""
    heads, nbytes, padded = shape
    scores, weights, kept = spare
    room = len(weights)
    for first in range(0, end, BLOCK):
        keys = _at(caches[0], first)
        tokens = min(BLOCK, end - first)
        _score(kind, (heads, tokens, nbytes, padded), memory, keys, _at(keys, BLOCK))
        h = 0
        while h < heads:
            n, _, block, _, _ = _tile(h, heads, padded, memory)
            move(block, BLOCK * n // LANES, scores[h * room + first * n :].ctypes.data)
            h += n
    weights[:] = 0
    h = 0
    while h < heads:
        n = _tile(h, heads, padded, memory)[0]
        weigh(n, end, scores[h * room :].ctypes.data, weights.ctypes.data)
        h += n
    found = keep(weights, end, count, kept)
    if weights[0] != weights[0]:
        found = 0  # a score isn't a number, nor is then the result: of no tokens it is 0 / 0
    for first in range(0, found, BLOCK):
        picks = kept[first : min(first + BLOCK, found)]
        h = 0
        while h < heads:
            n, _, block, sums, state = _tile(h, heads, padded, memory)
            gather(scores[h * room :], n, picks, block)
            soften(n, len(picks), padded, block, sums, state)
            mix(kind, n, (len(picks), nbytes), block, caches[1], picks.ctypes.data, sums, caches[1])
            h += n


@numba.njit(nogil=True)
def _begin(kind, n, dim, scale, rows, lanes, dtype, place, sums, state):
    """A tile's queries from their rows; lanes, dtype: as for _attend."""
    if lanes is None:
        begin(kind, n, dim, scale, rows, place, sums, state)
    else:
        for i in range(n):
            spread(dtype, _at(rows, i)[0], lanes.ctypes.data, len(lanes), _at(sums, i)[0])
        begin(kind, n, len(lanes), scale, sums, place, sums, state)


@numba.njit(nogil=True)
def _give(kind, n, dim, sums, state, lanes, dtype, rows):
    """A tile's results into their rows; lanes, dtype: as for _attend."""
    if lanes is None:
        give(kind, n, dim, sums, state, rows)
    else:
        give(np.float32(0), n, len(lanes), sums, state, sums)
        for i in range(n):
            collect(dtype, _at(sums, i)[0], lanes.ctypes.data, len(lanes), _at(rows, i)[0])


@compiled
def _attend(
    kind, dtype, lanes, shape, counter, starts, spans, counts, vectors, caches, memory, spare
):
    """Takes (row, KV head) after (row, KV head) until none is left.

    dtype: of queries and results. lanes: the order of a packed row's elements, or else None.
    shape: rows, KV heads, heads of each, head_dim, bytes of a row, its vectors' lanes.
    starts, spans: of each row the first token that counts, and how many do; counts: how many of
    these are kept, or None; memory, spare: _scratch's.
    """
    rows, kv_heads, heads, dim, nbytes, padded = shape
    memory = memory.ctypes.data
    scale = np.float32(_LOG2_E / np.sqrt(dim))
    (q, q_row, q_head), (out, out_row, out_head) = vectors
    (k, k_row, k_head, k_token), (v, v_row, v_head, v_token) = caches
    item = take_next(counter.ctypes.data)
    while item < rows * kv_heads:
        row, head = item // kv_heads, item % kv_heads
        queries = (q + row * q_row + head * heads * q_head, q_head)
        results = (out + row * out_row + head * heads * out_head, out_head)
        keys = _at((k + row * k_row + head * k_head, k_token), starts[row])
        values = _at((v + row * v_row + head * v_head, v_token), starts[row])
        h = 0
        while h < heads:
            n, place, _, sums, state = _tile(h, heads, padded, memory)
            _begin(kind, n, dim, scale, _at(queries, h), lanes, dtype, place, sums, state)
            h += n
        if counts is None:
            _attend_one(kind, spans[row], (keys, values), (heads, nbytes, padded), memory)
        else:
            sizes = (heads, nbytes, padded)
            _attend_kept(kind, spans[row], counts[row], (keys, values), sizes, memory, spare)
        h = 0
        while h < heads:
            n, _, _, sums, state = _tile(h, heads, padded, memory)
            _give(kind, n, dim, sums, state, lanes, dtype, _at(results, h))
            h += n
        item = take_next(counter.ctypes.data)


def _scratch(heads: int, padded: int, tokens: int | None) -> tuple:
    """Zeros for one thread, from a line of the cache on, so that no vector lies in two lines.

    And, if sparse, room for so many tokens' scores, weights and positions.
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
