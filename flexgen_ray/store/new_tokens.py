"""New keys and values of a pass, on their way from packed tokens to where caches keep them.

Knows rows and places; no tiers.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.layout.rows import Row


class NewTokens:
    """Where the new tokens of (row, index into a home) lie and belong, for every layer alike.

    home: [2, rows, kv_heads, seq, width]; first: the packed token that keys and values begin
    with. Rows of one new token that are neighbours among the packed ones go together, by index.
    Beyond a row's own tokens a cache is finite, zeros or unused, for attention multiplies what it
    masks by zero, and zero times NaN is NaN: so what an earlier request left there is cleared.
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


def append_tokens(home: Tensor, new: NewTokens, kv: tuple[Tensor, Tensor]) -> None:
    """Keys and values, [tokens, kv_heads * width] each, into their home."""
    width = home.shape[-1]
    for part, values in zip(home, kv, strict=True):
        for tokens, places in new.runs:
            part.view(-1, width).index_copy_(0, places, values[tokens].view(-1, width))
        for tokens, index, start, stop in new.chunks:
            part[index, :, start:stop].copy_(split_heads(values[tokens], width))
        for index, start, stop in new.cleared:
            part[index, :, start:stop].zero_()


def split_heads(values: Tensor, width: int) -> Tensor:
    """[tokens, kv_heads * width] as [kv_heads, tokens, width]."""
    return values.unflatten(-1, (-1, width)).transpose(0, 1)
