"""Appends a pass's new keys and values, which lie as packed tokens, to the pages of rows.

Knows rows, pages and places; no tiers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flexgen_ray.kernels.host_threads import HostThreads
from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.layout.pages import PAGE_TOKENS, Home
from flexgen_ray.layout.placement import ALONE_BYTES
from flexgen_ray.layout.rows import Row


class NewTokens:
    """Source and target places of the new tokens of rows, computed once for all layers of a pass.

    placed: (row, its pages, index of its first new token among the keys and values).
    pool: pages of a layer, [2, pages, kv_heads, PAGE_TOKENS, width].

    runs: rows with one new token each that are neighbours among the tokens, keys and values of all
    copied together by index; chunks: (tokens, place in the page, page, number of pages) of rows
    with several new tokens, one copy for each run of whole pages and for each part of a page.
    """

    def __init__(self, placed: list[tuple[Row, Home, int]], pool: Tensor) -> None:
        num_pages, kv_heads = pool.shape[1:3]
        self.chunks: list[tuple[slice, slice, int, int]] = []
        runs: list[tuple[int, list[int]]] = []
        for row, home, start in placed:
            if row.num_new_tokens > 1:
                self.chunks += _pieces(row, home, start)
                continue
            page, place = divmod(row.position, PAGE_TOKENS)
            vector = home.pages[page] * kv_heads * PAGE_TOKENS + place
            if runs and runs[-1][0] + len(runs[-1][1]) == start:
                runs[-1][1].append(vector)
            else:
                runs.append((start, [vector]))
        self.runs: list[tuple[slice, Tensor]] = []
        if runs:
            # Places of the key and value vectors of the first page's first token.
            vectors = torch.arange(2 * kv_heads, device=pool.device).view(2, kv_heads)
            vectors = vectors * PAGE_TOKENS
            vectors[1] += (num_pages - 1) * kv_heads * PAGE_TOKENS
        for start, places in runs:
            of_rows = place_indices(places, pool.device).view(-1, 1, 1)
            self.runs.append((slice(start, start + len(places)), of_rows + vectors))


def _pieces(row: Row, home: Home, start: int) -> list[tuple[slice, slice, int, int]]:
    """Chunks of a row: the rest of its last page, whole pages, and the beginning of a page."""
    pieces: list[tuple[slice, slice, int, int]] = []
    at, end = row.position, row.seq_len

    def add(until: int, places: slice, page: int, count: int) -> None:
        nonlocal at, start
        pieces.append((slice(start, start + until - at), places, page, count))
        at, start = until, start + until - at

    def add_part(until: int) -> None:
        index, place = divmod(at, PAGE_TOKENS)
        add(until, slice(place, place + until - at), home.pages[index], 1)

    if at % PAGE_TOKENS:
        add_part(min(end, at - at % PAGE_TOKENS + PAGE_TOKENS))
    for _, page, count in home.runs(at // PAGE_TOKENS, end // PAGE_TOKENS):
        add(at + count * PAGE_TOKENS, slice(PAGE_TOKENS), page, count)
    if at < end:
        add_part(end)
    return pieces


def append_tokens(
    pool: Tensor, new: NewTokens, kv: Tensor, threads: HostThreads | None = None
) -> None:
    """Append keys and values, [tokens, 2, kv_heads, width], to pages.

    pool: as for NewTokens. threads: those that place chunks of prompts; None for the caller's
    alone.
    """
    for tokens, places in new.runs:
        pool.view(-1, pool.shape[-1]).index_put_((places,), kv[tokens])
    copies = []
    for tokens, places, page, count in new.chunks:
        source = kv[tokens].unflatten(0, (count, -1)).permute(2, 0, 3, 1, 4)
        copies.append((pool[:, page : page + count, :, places], source))
    nbytes = sum(target.nbytes for target, _ in copies)
    if threads is None or nbytes < ALONE_BYTES:
        for target, source in copies:
            target.copy_(source)
        return
    # Each thread takes a few pieces, so that all end together.
    largest = max(ALONE_BYTES // 4, nbytes // (4 * threads.count))
    tasks = []
    for target, source in copies:
        step = max(1, target.shape[1] * largest // target.nbytes)
        parts = zip(target.split(step, 1), source.split(step, 1), strict=True)
        tasks += [partial(to.copy_, of) for to, of in parts]
    threads.run(tasks)
