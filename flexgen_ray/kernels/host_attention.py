"""Attention of new tokens to a cache in host memory, at the speed its bytes can be read.

Keys and values are read once, as they are stored, packed or not, however many query heads share
them; arithmetic is float32 with an online softmax over blocks of tokens (Milakov and Gimelshein,
2018). Tokens lie in pages that a row's table names, in any order; before a block is attended, the
addresses of its tokens are listed, so nothing else knows of pages. A row is attended in parts of
PART_TOKENS tokens, so that threads have equal work however long rows are; each part and KV head is
the work of one thread, and the one that ends a row's last part merges them, in the order of tokens.
So results don't depend on the number of threads, on which rows are attended together, nor on pages.
Knows no tiers.

The work on a part and some KV heads, with the query heads that share them (a tile of host_tiles):

    for every tile of its query heads: _start_tile      queries scaled, sums cleared
    for every BLOCK of cached tokens:  _attend_some
        _list_block                                     addresses of keys and values
        for every tile: _score_block                    scores = keys @ queries
        for every tile: _add_block                      softmax, sums += weights @ values
    if the row has several parts:      keep_tiles, and after the last merge_tiles
    for every tile: _store_tiles                        results = sums / sum of weights

A block's keys and values come from memory for the first tile, and from the core's caches for the
others. Sparse attention (_attend_selected) scores all tokens first, selects those with the largest
weights, and then reads the values of these only.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from flexgen_ray.config import PART_TOKENS, kept_tokens
from flexgen_ray.kernels.attention import cache_bits
from flexgen_ray.kernels.host_parts import divide_rows, keep_tiles, make_partial, merge_tiles
from flexgen_ray.kernels.host_rows import (
    DTYPES,
    ROOM,
    collect_result,
    lane_order,
    list_rows,
    page_in,
    spread_query,
)
from flexgen_ray.kernels.host_scores import score_heads, score_one_head
from flexgen_ray.kernels.host_sparse import add_softmax, copy_vectors, gather_scores, keep_largest
from flexgen_ray.kernels.host_tiles import (
    AHEAD,
    BLOCK,
    add_weighted_values,
    floats_per_head,
    softmax_block,
    start_tile,
    store_results,
    tile_at,
)
from flexgen_ray.kernels.vectors import (
    KINDS,
    LANES,
    PACKED_KINDS,
    compiled,
    fetch_and_increment,
    floats_at,
)
from flexgen_ray.quant.packing import code_bytes

# Caches smaller than this are read faster by the caller than threads can be woken.
_ALONE_BYTES = 256 * 1024
_LIST = BLOCK + AHEAD + ROOM
# KV heads that a thread attends together: these lie side by side in a page, and memory that is read
# in order is read fastest. Tokens of each head that are scored, and weighed, before the next head.
_TOGETHER = 32
_SCORED = 32
_WEIGHED = 32
_LOG2_E = 1.4426950408889634


class HostAttention:
    """Host attention on a number of threads, of which the caller's is one.

    part_tokens: tokens of a row that a thread attends at a time; results depend on it by rounding.
    """

    def __init__(self, threads: int, part_tokens: int = PART_TOKENS) -> None:
        self.threads, self.part_tokens = threads, part_tokens
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), "host-attention")

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lens: list[int],
        out: Tensor,
        sparsity: float = 1.0,
        window: int | None = None,
        lse: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Attend one new token per row to its cache, into out.

        q, out: [rows, heads, head_dim], float32, float16 or bfloat16.
        keys, values: [pages, kv_heads, tokens of a page, head_dim] of the same dtype; or quantized
        to 4 or 8 bits, uint8 [..., packed_bytes(head_dim, bits)]. All in host memory, with any
        strides except that the last dimension is dense.
        tables: int32 [rows, n], the pages of each row in order: token t is in page t // tokens of a
        page. Entries of pages without an attended token may be any number.
        lens: valid tokens of each row, the new one included; nothing beyond them is read.
        sparsity: share of tokens that are attended, those that attention.decode_sparse selects; no
        value of the others is read.
        window: number of a row's last tokens that are attended, None for all; nothing before them
        is read.
        lse: None, or float32 [rows, heads] for the logarithm of the sum of exp(score) over the
        attended tokens and the sink.
        sinks: None, or float32 [heads], a score of each head that joins the softmax and has no
        value.
        Raises ValueError if the tensors don't fit together.
        """
        bits = _check(q, (keys, values), (out, lse), sinks)
        _check_tables(tables, lens, len(q), keys.shape[2])
        starts = [0 if window is None else max(0, end - window) for end in lens]
        spans = [end - start for start, end in zip(starts, lens, strict=True)]
        counts = None
        if sparsity != 1:
            counts = np.array([kept_tokens(tokens, sparsity) for tokens in spans], np.int64)
        # Sparse attention chooses among all tokens of a row, so it takes the row whole.
        most = self.part_tokens if counts is None else max(spans)
        parts = divide_rows(spans, most)
        group = self._group(len(parts[0]), keys.shape[1])
        kind, dtype, lanes, shape = _describe(q, keys, bits, group)
        vectors = _places(q, 2), _places(out, 2), _places(lse, 2), _places(sinks, 0)[0]
        planes = _places(keys, 3), _places(values, 3)
        tables = tables.contiguous()
        pool = _places(tables, 1), *planes, (len(keys), keys.shape[2])
        progress = np.zeros(2, np.int64)
        rows_of = np.array(starts, np.int64), np.array(lens, np.int64)
        _, kv_heads, group, heads, _, nbytes, padded = shape
        items = len(parts[0]) * -(-kv_heads // group)
        several = most, *parts, *make_partial(parts, kv_heads, heads * (padded + 2 * LANES))
        task = (kind, dtype, lanes, shape, progress, rows_of, counts, several, vectors, pool)
        small = 2 * sum(spans) * kv_heads * nbytes < _ALONE_BYTES
        helpers = 0 if small else min(self.threads, items) - 1
        room, sizes = None if counts is None else max(spans), (group, heads, padded)
        own, *others = (_make_workspace(sizes, room) for _ in range(helpers + 1))
        running = [self._pool.submit(_attend, *task, *other) for other in others]
        try:
            _attend(*task, *own)
        finally:
            for future in running:
                future.result()
        if progress[1]:
            row, pages = progress[1] - 1, len(keys)
            raise ValueError(f"tables of row {row} name a page beyond the {pages} of the cache")

    def _group(self, parts: int, kv_heads: int) -> int:
        """Number of KV heads that are attended together: fewer if threads would lack work."""
        return max(1, min(_TOGETHER, kv_heads, parts * kv_heads // (4 * self.threads)))


def _check(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor | None],
    sinks: Tensor | None,
) -> int | None:
    """Bits of a quantized value of the cache, None if it isn't quantized; ValueError as above."""
    (_, heads, head_dim), (keys, values), (out, lse) = q.shape, cache, results
    bits = cache_bits(keys, head_dim)
    fits = keys.shape == values.shape and keys.ndim == 4 and out.shape == q.shape
    if not fits or (bits is None and keys.shape[3] != head_dim):
        shapes = [tuple(x.shape) for x in (q, keys, values, out)]
        raise ValueError(f"q, keys, values and out don't fit together: {shapes}")
    if head_dim < LANES:
        raise ValueError(f"head_dim {head_dim} is below {LANES}, a vector of this CPU")
    if heads % keys.shape[1]:
        raise ValueError(f"{heads} heads are not a multiple of {keys.shape[1]} KV heads")
    dtypes = [x.dtype for x in (q, out, keys, values)]
    if dtypes != [q.dtype] * 2 + [torch.uint8 if bits else q.dtype] * 2:
        raise ValueError(f"q, out, keys and values have dtypes that don't fit together: {dtypes}")
    if any(x.stride(-1) != 1 for x in (q, keys, values, out)):
        raise ValueError("q, keys, values and out must have a dense last dimension")
    if lse is not None and (lse.shape != q.shape[:2] or lse.dtype != torch.float32):
        raise ValueError(f"lse must be float32 {list(q.shape[:2])}: {lse.dtype} {list(lse.shape)}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype != torch.float32):
        raise ValueError(f"sinks must be float32 [{heads}]: {sinks.dtype} {list(sinks.shape)}")
    if sinks is not None and not sinks.is_contiguous():
        raise ValueError("sinks must be dense")
    return bits


def _check_tables(tables: Tensor, lens: list[int], rows: int, page_tokens: int) -> None:
    """Raises ValueError if tables have too few places for the rows' tokens, or aren't int32."""
    if tables.ndim != 2 or tables.dtype != torch.int32 or len(tables) != rows:
        actual = f"{tables.dtype} {list(tables.shape)}"
        raise ValueError(f"tables must be int32 [{rows}, pages of a row], not {actual}")
    room = tables.shape[1] * page_tokens
    if len(lens) != rows or min(lens) < 1 or max(lens) > room:
        raise ValueError(f"lens {lens} must be {rows} numbers from 1 to {room}")


def _places(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Address of a tensor and the bytes from element to element along its first dimensions.

    Zeros for None.
    """
    if x is None:
        return (0,) * (dims + 1)
    return (x.data_ptr(), *(x.element_size() * stride for stride in x.stride()[:dims]))


def _describe(q: Tensor, keys: Tensor, bits: int | None, group: int) -> tuple:
    """Arguments of _attend that describe queries and cache: kind, dtype, lanes and shape."""
    (rows, heads, head_dim), kv_heads = q.shape, keys.shape[1]
    dtype = str(q.dtype).removeprefix("torch.")
    shape = (rows, kv_heads, group, heads // kv_heads, head_dim)
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
def _list_block(plane, row, first, into):
    """List BLOCK tokens from the first on; from the row's end on, the last one again and again.

    plane: address of one KV head's keys or values, bytes from page to page and from token to token.
    row: (address of its table, tokens of a page, its tokens). into: address.
    Numbers and addresses only: an array's reference count is atomic, and waits for all reads.
    """
    address, page_bytes, token_bytes = plane
    table, size, end = row
    j, start = 0, address
    while j < BLOCK and first + j < end:
        token = first + j
        place = token % size
        count = min(size - place, BLOCK - j, end - token)
        start = address + page_in(table, token // size) * page_bytes + place * token_bytes
        list_rows(start, token_bytes, count, into + 8 * j)
        start += (count - 1) * token_bytes
        j += count
    list_rows(start, 0, BLOCK - j, into + 8 * j)


@numba.njit(nogil=True)
def _list_picks(plane, row, start, picks, into):
    """List the picked tokens, which are counted from a start; then the last one again and again.

    plane, row, into: as for _list_block.
    """
    address, page_bytes, token_bytes = plane
    table, size, _ = row
    place = address
    for j in range(len(picks)):
        token = start + picks[j]
        place = address + page_in(table, token // size) * page_bytes + token % size * token_bytes
        list_rows(place, 0, 1, into + 8 * j)
    list_rows(place, 0, AHEAD, into + 8 * len(picks))


@numba.njit(nogil=True)
def _lists_at(lists):
    """Addresses of the three lists of a workspace."""
    return lists, lists + 8 * _LIST, lists + 16 * _LIST


@numba.njit(nogil=True)
def _row_list(rows, first, head):
    """List of a KV head's rows from one on; rows: (first KV head's, bytes to the next)."""
    return rows[0] + 8 * first, head * rows[1]


@numba.njit(nogil=True)
def _rows_after(rows, ahead, turn, shape):
    """Rows that are read after those of a KV head and chunk."""
    (head, first), (group, tokens, chunk) = turn, shape
    if head + 1 < group:
        return _row_list(rows, first, head + 1)
    if first + chunk < tokens:
        return _row_list(rows, first + chunk, 0)
    return _row_list(ahead, 0, 0)


@numba.njit(nogil=True)
def _score_block(kind, shape, memory, rows, ahead):
    """Scores of a block's tokens for all heads; shape: (KV heads, heads, tokens, nbytes, padded).

    rows: of the block's keys, as for _row_list; ahead: rows that are read next.
    """
    group, heads, tokens, nbytes, padded = shape
    per_head = 4 * heads * floats_per_head(padded)
    scratch = memory + group * per_head
    for first in range(0, tokens, _SCORED):
        some = min(_SCORED, tokens - first)
        for head in range(group):
            later = _rows_after(rows, ahead, (head, first), (group, tokens, _SCORED))
            h = 0
            while h < heads:
                n, q, w, _, _ = tile_at(h, heads, padded, memory + head * per_head)
                if n == 1:
                    for i in range(first, first + some, LANES):
                        count, these = min(LANES, first + some - i), _row_list(rows, i, head)
                        score_one_head(kind, count, nbytes, q, these, scratch, w + 4 * i)
                else:
                    these = _row_list(rows, first, head)
                    score_heads(kind, n, (some, nbytes), q, these, w + 4 * n * first, later)
                h += n


@numba.njit(nogil=True)
def _add_block(kind, shape, memory, rows, ahead):
    """Softmax of a block's scores, and weighted values; arguments as for _score_block."""
    group, heads, tokens, nbytes, padded = shape
    per_head = 4 * heads * floats_per_head(padded)
    for head in range(group):
        h = 0
        while h < heads:
            n, _, scores, sums, state = tile_at(h, heads, padded, memory + head * per_head)
            softmax_block(n, tokens, padded, scores, sums, state)
            h += n
    for first in range(0, tokens, _WEIGHED):
        some = min(_WEIGHED, tokens - first)
        for head in range(group):
            later = _rows_after(rows, ahead, (head, first), (group, tokens, _WEIGHED))
            these = _row_list(rows, first, head)
            h = 0
            while h < heads:
                n, _, scores, sums, _ = tile_at(h, heads, padded, memory + head * per_head)
                weights = scores + 4 * n * first
                add_weighted_values(kind, n, (some, nbytes), weights, these, sums, later)
                h += n


@numba.njit(nogil=True)
def _attend_some(kind, start, row, planes, shape, memory, lists):
    """Attend a row's tokens from a start on, for some KV heads: sums and state of every tile.

    row: as for _list_block; planes: (plane, bytes to the next KV head) of keys and of values.
    shape: (KV heads, heads of each, nbytes, padded); lists: workspace, as for _attend.
    """
    group, heads, nbytes, padded = shape
    (key_pages, key_head), (value_pages, value_head) = planes
    keys, later, values = _lists_at(lists)
    end = row[2]
    _list_block(key_pages, row, start, keys)
    for first in range(start, end, BLOCK):
        tokens = min(BLOCK, end - first)
        _list_block(value_pages, row, first, values)
        ahead = keys
        if first + BLOCK < end:
            ahead = later
            _list_block(key_pages, row, first + BLOCK, ahead)
        sizes = (group, heads, tokens, nbytes, padded)
        _score_block(kind, sizes, memory, (keys, key_head), (values, value_head))
        _add_block(kind, sizes, memory, (values, value_head), (ahead, key_head))
        keys, later = later, keys


@numba.njit(nogil=True)
def _attend_selected(kind, start, count, row, planes, shape, memory, lists, spare, sinks):
    """Attend the `count` heaviest of a row's tokens; as _attend_some otherwise.

    spare: workspace for sparse attention, from _make_workspace. sinks: as for _add_sinks, or 0.
    """
    group, heads, nbytes, padded = shape
    (key_pages, key_head), (value_pages, value_head) = planes
    per_head = 4 * heads * floats_per_head(padded)
    scores, weights, selected = spare
    score_at = scores.ctypes.data
    room, span = len(weights), row[2] - start
    keys, later, values = _lists_at(lists)
    _list_block(key_pages, row, start, keys)
    for first in range(0, span, BLOCK):
        tokens = min(BLOCK, span - first)
        ahead = keys
        if first + BLOCK < span:
            ahead = later
            _list_block(key_pages, row, start + first + BLOCK, ahead)
        sizes = (group, heads, tokens, nbytes, padded)
        _score_block(kind, sizes, memory, (keys, key_head), (ahead, key_head))
        for head in range(group):
            h = 0
            while h < heads:
                n, _, block, _, _ = tile_at(h, heads, padded, memory + head * per_head)
                place = (head * heads + h) * room + first * n
                copy_vectors(block, BLOCK * n // LANES, score_at + 4 * place)
                h += n
        keys, later = later, keys
    for head in range(group):
        weights[:] = 0
        h = 0
        while h < heads:
            n = tile_at(h, heads, padded, memory)[0]
            place = (head * heads + h) * room
            scored = span
            if sinks != 0:
                # A token more, whose weight isn't looked at.
                for i in range(n):
                    scores[place + span * n + i] = _sink(sinks, head * heads + h + i)
                scored += 1
            add_softmax(n, scored, score_at + 4 * place, weights.ctypes.data)
            h += n
        num_selected = keep_largest(weights, span, count, selected)
        if weights[0] != weights[0]:
            num_selected = 0  # a score is NaN, so the result must be: without tokens it is 0 / 0
        for first in range(0, num_selected, BLOCK):
            picks = selected[first : min(first + BLOCK, num_selected)]
            coming = selected[first : min(first + BLOCK + AHEAD, num_selected)]
            _list_picks(value_pages, row, start, coming, values)
            these = values, head * value_head
            coming_rows = values + 8 * AHEAD, head * value_head
            h = 0
            while h < heads:
                n, _, block, sums, state = tile_at(h, heads, padded, memory + head * per_head)
                gather_scores(scores[(head * heads + h) * room :], n, picks, block)
                softmax_block(n, len(picks), padded, block, sums, state)
                picked = (len(picks), nbytes)
                add_weighted_values(kind, n, picked, block, these, sums, coming_rows)
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


@numba.njit(nogil=True)
def _store_log_sums(n, state, into, step):
    """Write the logarithm of each head's sum of exp(score), a number of bytes apart.

    NaN if no token was attended, or a score is NaN.
    """
    numbers = carray(floats_at(state), 2 * LANES)
    for i in range(n):
        total = 0.0
        for lane in range(i, LANES, n):
            total += numbers[LANES + lane]
        log_sum = np.log2(total) if total > 0 else np.nan
        carray(floats_at(into + i * step), 1)[0] = (numbers[i] + log_sum) / _LOG2_E


@numba.njit(nogil=True)
def _sink(sinks, head):
    """Sink of a head, as an exponent of two; sinks: address."""
    return carray(floats_at(sinks + 4 * head), 1)[0] * np.float32(_LOG2_E)


@numba.njit(nogil=True)
def _add_sinks(shape, memory, sinks):
    """Let each head's sink join the sum of its weights, for the tiles of some KV heads.

    shape: as for _store_tiles. sinks: address of those of the first query head. A head that
    attended no token is left as it is.
    """
    group, heads, _, padded = shape
    per_head = 4 * heads * floats_per_head(padded)
    for i in range(group):
        h = 0
        while h < heads:
            n, _, _, sums, state = tile_at(h, heads, padded, memory + i * per_head)
            numbers = carray(floats_at(state), 2 * LANES)
            for j in range(n):
                sink, largest = _sink(sinks, i * heads + h + j), numbers[j]
                if largest == -np.inf:
                    continue
                if sink > largest:
                    factor = np.exp2(largest - sink)
                    carray(floats_at(_from(sums, j)[0]), padded)[:] *= factor
                    for lane in range(j, LANES, n):
                        numbers[lane] = sink
                        numbers[LANES + lane] *= factor
                numbers[LANES + j] += np.exp2(sink - numbers[j])
            h += n


@numba.njit(nogil=True)
def _are_pages(table, first, end, pages):
    """True if a part of a table names nothing but pages."""
    for i in range(first, end):
        if page_in(table, i) < 0 or page_in(table, i) >= pages:
            return False
    return True


@numba.njit(nogil=True)
def _start_tiles(kind, shape, scale, rows, lanes, dtype, memory):
    """Prepare the tiles of some KV heads; shape: (KV heads, heads of each, head_dim, padded)."""
    group, heads, dim, padded = shape
    per_head = 4 * heads * floats_per_head(padded)
    for i in range(group):
        h = 0
        while h < heads:
            n, into, _, sums, state = tile_at(h, heads, padded, memory + i * per_head)
            _start_tile(
                kind, n, dim, scale, _from(rows, i * heads + h), lanes, dtype, into, sums, state
            )
            h += n


@numba.njit(nogil=True)
def _store_tiles(kind, shape, memory, lanes, dtype, rows, log_sums):
    """Write the results of some KV heads' tiles, and their logarithms unless their address is 0.

    shape as above; rows, log_sums: matrices of the query heads' results and logarithms.
    """
    group, heads, dim, padded = shape
    per_head = 4 * heads * floats_per_head(padded)
    for i in range(group):
        h = 0
        while h < heads:
            n, _, _, sums, state = tile_at(h, heads, padded, memory + i * per_head)
            _store_tile(kind, n, dim, sums, state, lanes, dtype, _from(rows, i * heads + h))
            if log_sums[0] != 0:
                _store_log_sums(n, state, _from(log_sums, i * heads + h)[0], log_sums[1])
            h += n


@compiled
def _attend(
    kind, dtype, lanes, shape, progress, rows_of, counts, parts, vectors, pool, memory, lists, spare
):
    """Takes (part of a row, KV heads) after (part, KV heads) until none is left.

    dtype: of queries and results. lanes: the lane_order of a packed row's elements, or else None.
    shape: rows, KV heads, heads of each, head_dim, bytes of a row, its vectors' lanes.
    progress: pairs taken; and, if its table is wrong, a row plus one. rows_of: each row's first
    token that counts, and where they end; counts: how many of these are kept, or None. parts:
    their tokens, and divide_rows's and make_partial's arrays. vectors: _places of queries, results
    and their logarithms, and the address of the sinks. pool: tables, _places of keys and of values,
    and (pages, tokens of a page). memory, lists, spare: _make_workspace's.
    """
    _, kv_heads, group, heads, dim, nbytes, padded = shape
    (starts, ends), (most, row_of, first_part, first_place, partial, done) = rows_of, parts
    memory, lists = memory.ctypes.data, lists.ctypes.data
    scale = np.float32(_LOG2_E / np.sqrt(dim))
    (q, q_row, q_head), (out, out_row, out_head), (lse, lse_row, lse_head), all_sinks = vectors
    (tables, table_bytes), (k, k_page, k_head, k_token), (v, v_page, v_head, v_token), sizes = pool
    pages, size = sizes
    per_part, kept_bytes = -(-kv_heads // group), 4 * heads * (padded + 2 * LANES)
    item = fetch_and_increment(progress.ctypes.data)
    while item < len(row_of) * per_part:
        part, head = item // per_part, item % per_part * group
        row = row_of[part]
        nth, several = part - first_part[row], first_part[row + 1] - first_part[row]
        start, end = starts[row] + nth * most, ends[row]
        if nth + 1 < several:
            end = start + most
        place = (tables + row * table_bytes, size, end)
        if not _are_pages(place[0], start // size, (end - 1) // size + 1, pages):
            progress[1] = row + 1
            return
        some, first = min(group, kv_heads - head), head * heads
        sinks = all_sinks
        if sinks != 0:
            sinks += 4 * first
        queries = (q + row * q_row + first * q_head, q_head)
        results = (out + row * out_row + first * out_head, out_head)
        key_pages = (k + head * k_head, k_page, k_token)
        value_pages = (v + head * v_head, v_page, v_token)
        planes = (key_pages, k_head), (value_pages, v_head)
        tiles, sizes = (some, heads, dim, padded), (some, heads, nbytes, padded)
        _start_tiles(kind, tiles, scale, queries, lanes, dtype, memory)
        if counts is None:
            _attend_some(kind, start, place, planes, sizes, memory, lists)
        else:
            _attend_selected(
                kind, start, counts[row], place, planes, sizes, memory, lists, spare, sinks
            )
        finished = 0
        if several > 1:
            copies = partial.ctypes.data + (first_place[row] * kv_heads + head) * kept_bytes
            step = kv_heads * kept_bytes
            keep_tiles(tiles, memory, copies + nth * step)
            finished = fetch_and_increment(done.ctypes.data + 8 * (row * kv_heads + head))
            if finished + 1 == several:
                merge_tiles(tiles, memory, copies, step, several)
        if finished + 1 == several:
            if sinks != 0:
                _add_sinks(tiles, memory, sinks)
            log_sums = lse
            if lse != 0:
                log_sums += row * lse_row + first * lse_head
            _store_tiles(kind, tiles, memory, lanes, dtype, results, (log_sums, lse_head))
        item = fetch_and_increment(progress.ctypes.data)


def _make_workspace(sizes: tuple[int, int, int], tokens: int | None) -> tuple:
    """Workspace of one thread, zeros: (memory, lists, spare) as for _attend.

    memory starts at a cache line, so that no vector lies in two lines. lists: of a block's keys,
    the next block's, and values. spare, only for sparse attention: scores, weights and positions of
    a number of tokens.
    """
    group, heads, padded = sizes
    floats = group * heads * floats_per_head.py_func(padded) + LANES * LANES
    memory = np.zeros(floats + 16, np.float32)
    start = -(memory.ctypes.data // 4) % 16
    memory = memory[start : start + floats]
    lists = np.zeros(3 * _LIST, np.int64)
    if tokens is None:
        return memory, lists, None
    room = -(-(tokens + 1) // BLOCK) * BLOCK  # for the sink, too
    scores, weights = np.zeros(group * heads * room, np.float32), np.zeros(room, np.float32)
    return memory, lists, (scores, weights, np.zeros(room + 1, np.int64))
