"""Appends a pass's new keys and values, which lie as packed tokens, to the rows of a cache.

Knows rows and places; no tiers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flexgen_ray.kernels.host_threads import HostThreads
from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.layout.placement import ALONE_BYTES
from flexgen_ray.layout.rows import Row


class NewTokens:
    """Source and target places of the new tokens of rows, computed once for all layers of a pass.

    placed: (row, its index in the cache); home: the cache, [2, rows, kv_heads, seq, width]; first:
    index of the packed token that the keys and values begin with.

    runs: rows with one new token each that are neighbours among the packed tokens, keys and values
    of all copied together by index; chunks: rows with several new tokens, one copy each; cleared:
    what an earlier request left beyond a row's own tokens, which becomes zeros, because attention
    multiplies masked values by zero, and zero times NaN is NaN.
    """

    def __init__(self, placed: list[tuple[Row, int]], home: Tensor, first: int = 0) -> None:
        slots, kv_heads, seq = home.shape[1:4]
        self.chunks: list[tuple[slice, int, int, int]] = []
        self.cleared: list[tuple[int, int, int]] = []
        runs: list[tuple[int, list[int]]] = []
        for row, index in placed:
            start = row.offset - first
            if row.stale > row.seq_len:
                self.cleared.append((index, row.seq_len, row.stale))
            if row.num_new_tokens > 1:
                tokens = slice(start, start + row.num_new_tokens)
                self.chunks.append((tokens, index, row.position, row.seq_len))
                continue
            place = index * kv_heads * seq + row.position
            if runs and runs[-1][0] + len(runs[-1][1]) == start:
                runs[-1][1].append(place)
            else:
                runs.append((start, [place]))
        self.runs: list[tuple[slice, Tensor]] = []
        if runs:
            # Places of the key and value vectors of the first slot's first token.
            vectors = torch.arange(2 * kv_heads, device=home.device).view(2, kv_heads) * seq
            vectors[1] += (slots - 1) * kv_heads * seq
        for start, places in runs:
            of_rows = place_indices(places, home.device).view(-1, 1, 1)
            self.runs.append((slice(start, start + len(places)), of_rows + vectors))


def append_tokens(
    home: Tensor, new: NewTokens, kv: Tensor, threads: HostThreads | None = None
) -> None:
    """Append keys and values, [tokens, 2, kv_heads, width], to the rows of a cache.

    threads: those that place chunks of prompts; None for the caller's alone.
    """
    for tokens, places in new.runs:
        home.view(-1, home.shape[-1]).index_put_((places,), kv[tokens])
    for index, start, stop in new.cleared:
        home[:, index, :, start:stop].zero_()
    chunks = [
        (home[:, index, :, start:stop], kv[tokens].permute(1, 2, 0, 3))
        for tokens, index, start, stop in new.chunks
    ]
    nbytes = sum(target.nbytes for target, _ in chunks)
    if threads is None or nbytes < ALONE_BYTES:
        for target, source in chunks:
            target.copy_(source)
        return
    # Each thread takes a few pieces of a chunk, so that all end together.
    heads = max(1, 2 * home.shape[2] * len(chunks) // (4 * threads.count))
    threads.run(
        [
            partial(to.copy_, of)
            for target, source in chunks
            for part in (0, 1)
            for to, of in zip(target[part].split(heads), source[part].split(heads), strict=True)
        ]
    )
