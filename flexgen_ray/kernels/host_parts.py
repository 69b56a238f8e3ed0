"""Parts of a row in host attention: each is attended by itself, and the last to end merges them.

A part leaves the sums and states of its tiles (host_tiles): for each head the largest score, the
sum of weights relative to it, and the weighted sum of values. Parts of a row lie side by side:

    [part][KV head][query head][padded + 2 * LANES]

Knows rows by their lengths, and tiles; no caches.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import carray

from flexgen_ray.kernels.host_sparse import copy_vectors
from flexgen_ray.kernels.host_tiles import floats_per_head, tile_at
from flexgen_ray.kernels.vectors import LANES, floats_at


def divide_rows(spans: list[int], most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parts of rows, of `most` tokens each and the last one of what is left.

    spans: tokens of each row. Returns the row of each part; the first part of each row, and at the
    end the number of all; and the same with only the parts of rows that have several.
    """
    counts = -(-np.array(spans, np.int64) // most)
    row_of = np.repeat(np.arange(len(spans)), counts)
    first = np.concatenate(([0], np.cumsum(counts)))
    return row_of, first, np.concatenate(([0], np.cumsum(counts * (counts > 1))))


def make_partial(parts: tuple, kv_heads: int, floats: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for the tiles of rows that have several parts, and zeros that count finished parts.

    parts: from divide_rows. floats: of a part and KV head. The zeros are one a row and KV head.
    """
    _, first, places = parts
    room = np.empty(places[-1] * kv_heads * floats, np.float32)
    return room, np.zeros((len(first) - 1) * kv_heads, np.int64)


@numba.njit(nogil=True)
def keep_tiles(shape, memory, into):
    """Copy sums and states of the tiles of some KV heads to the place of a part.

    shape: (KV heads, heads of each, head_dim, padded). into: address.
    """
    group, heads, _, padded = shape
    per_head = 4 * heads * floats_per_head(padded)
    for i in range(group):
        h = 0
        while h < heads:
            n, _, _, sums, _ = tile_at(h, heads, padded, memory + i * per_head)
            place = into + 4 * (i * heads + h) * (padded + 2 * LANES)
            # The state lies behind the sums.
            copy_vectors(sums[0], n * padded // LANES + 2, place)
            h += n


@numba.njit(nogil=True)
def merge_tiles(shape, memory, parts, step, count):
    """Put into the tiles what a row's parts have together, in their order.

    shape: as for keep_tiles. parts: address of the first part's copies; step: bytes from part to
    part; count: of parts.
    """
    group, heads, _, padded = shape
    per_head = 4 * heads * floats_per_head(padded)
    for i in range(group):
        h = 0
        while h < heads:
            n, _, _, sums, _ = tile_at(h, heads, padded, memory + i * per_head)
            place = parts + 4 * (i * heads + h) * (padded + 2 * LANES)
            _merge_tile(n, padded, carray(floats_at(sums[0]), n * padded + 2 * LANES), place, step,
                        count)  # fmt: skip
            h += n


@numba.njit(nogil=True)
def _merge_tile(n, padded, merged, place, step, count):
    """Merge one tile of n heads into its sums and, behind them, its state."""
    state = n * padded
    size = state + 2 * LANES
    for lane in range(LANES):
        largest = np.float32(-np.inf)
        for part in range(count):
            score = carray(floats_at(place + part * step), size)[state + lane]
            if not score <= largest:
                largest = score
        merged[state + lane] = largest
    merged[:state] = 0
    merged[state + LANES :] = 0
    for part in range(count):
        copied = carray(floats_at(place + part * step), size)
        for lane in range(LANES):
            factor = np.exp2(copied[state + lane] - merged[state + lane])
            merged[state + LANES + lane] += factor * copied[state + LANES + lane]
            if lane < n:
                for d in range(lane * padded, (lane + 1) * padded):
                    merged[d] += factor * copied[d]
