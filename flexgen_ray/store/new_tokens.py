"""Appends a pass's new keys and values, which lie as packed tokens, to the rows of a cache.

Knows rows and places; no tiers.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from flexgen_ray.kernels.host_threads import HostThreads
from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.layout.placement import ALONE_BYTES
from flexgen_ray.layout.rows import Row


class NewTokens:
    """Source and target places of the new tokens of rows, computed once for all layers of a pass.

    placed: (row, its index in the cache); home: the cache, [2, rows, kv_heads, seq, width]; first:
    index of the packed token that the keys and values begin with.

    runs: rows with one new token each that are neighbours among the packed tokens, copied together
    by index; chunks: rows with several new tokens, one copy each; cleared: what an earlier request
    left beyond a row's own tokens, which becomes zeros, because attention multiplies masked values
    by zero, and zero times NaN is NaN.
    """

    def __init__(self, placed: list[tuple[Row, int]], home: Tensor, first: int = 0) -> None:
        kv_heads, seq = home.shape[2:4]
        self.chunks: list[tuple[slice, int, int, int]] = []
        self.cleared: list[tuple[int, int, int]] = []
        runs: list[tuple[int, list[list[int]]]] = []
        for row, index in placed:
            start = row.offset - first
            if row.stale > row.seq_len:
                self.cleared.append((index, row.seq_len, row.stale))
            if row.num_new_tokens > 1:
                tokens = slice(start, start + row.num_new_tokens)
                self.chunks.append((tokens, index, row.position, row.seq_len))
                continue
            places = [(index * kv_heads + head) * seq + row.position for head in range(kv_heads)]
            if runs and runs[-1][0] + len(runs[-1][1]) == start:
                runs[-1][1].append(places)
            else:
                runs.append((start, [places]))
        self.runs = [
            (slice(start, start + len(rows)), place_indices(rows, home.device).flatten())
            for start, rows in runs
        ]


def append_tokens(
    home: Tensor, new: NewTokens, kv: tuple[Tensor, Tensor], threads: HostThreads | None = None
) -> None:
    """Append keys and values, [tokens, kv_heads * width] each, to the rows of a cache.

    threads: those that place chunks of prompts; None for the caller's alone.
    """
    width = home.shape[-1]
    for part, values in zip(home, kv, strict=True):
        for tokens, places in new.runs:
            part.view(-1, width).index_copy_(0, places, values[tokens].view(-1, width))
        for index, start, stop in new.cleared:
            part[index, :, start:stop].zero_()
    chunks = [
        (part[index, :, start:stop], split_heads(values[tokens], width))
        for part, values in zip(home, kv, strict=True)
        for tokens, index, start, stop in new.chunks
    ]
    nbytes = sum(target.nbytes for target, _ in chunks)
    if threads is None or nbytes < ALONE_BYTES:
        for target, source in chunks:
            target.copy_(source)
        return
    # Each thread takes a few pieces of a chunk, so that all end together.
    heads = max(1, home.shape[2] * len(chunks) // (4 * threads.count))
    threads.run(
        [
            partial(to.copy_, of)
            for target, source in chunks
            for to, of in zip(target.split(heads), source.split(heads), strict=True)
        ]
    )


def split_heads(values: Tensor, width: int) -> Tensor:
    """View [tokens, kv_heads * width] as [kv_heads, tokens, width]."""
    return values.unflatten(-1, (-1, width)).transpose(0, 1)
