"""Appends a pass's new keys and values, which lie as packed tokens, to the pages of rows.

Knows pieces of rows, pages and places; no tiers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.layout.pages import PAGE_TOKENS, Home
from flexgen_ray.layout.rows import Piece


class NewTokens:
    """Source and target places of new tokens of rows, computed once for all layers of a pass.

    placed: (piece, pages of its row, index of its first token among the keys and values). Those of
    whole pages are copied page by page, the others by index, neighbours together.
    pool: pages of a layer, [2, pages, kv_heads, PAGE_TOKENS, width].
    """

    def __init__(self, placed: list[tuple[Piece, Home, int]], pool: Tensor) -> None:
        num_pages, kv_heads = pool.shape[1:3]
        self.pages: list[tuple[slice, slice]] = []
        runs: list[tuple[int, list[int]]] = []
        for piece, home, start in placed:
            if piece.count % PAGE_TOKENS == 0:
                self.pages += page_copies(piece, home, start)
                continue
            page, place = divmod(piece.position, PAGE_TOKENS)
            vector = home.page(page) * kv_heads * PAGE_TOKENS + place
            vectors = range(vector, vector + piece.count)
            if runs and runs[-1][0] + len(runs[-1][1]) == start:
                runs[-1][1].extend(vectors)
            else:
                runs.append((start, [*vectors]))
        self.runs: list[tuple[slice, Tensor]] = []
        if runs:
            # Places of the key and value vectors of the first page's first token.
            heads = torch.arange(2 * kv_heads, device=pool.device).view(2, kv_heads) * PAGE_TOKENS
            heads[1] += (num_pages - 1) * kv_heads * PAGE_TOKENS
        for start, places in runs:
            of_tokens = place_indices(places, pool.device).view(-1, 1, 1)
            self.runs.append((slice(start, start + len(places)), of_tokens + heads))


def page_copies(piece: Piece, home: Home, start: int) -> list[tuple[slice, slice]]:
    """(tokens, pages) of each run of neighbouring pages that a piece fills.

    start: index of the piece's first token.
    """
    first = piece.position // PAGE_TOKENS
    copies = []
    for index, page, count in home.runs(first, first + piece.count // PAGE_TOKENS):
        at = start + (index - first) * PAGE_TOKENS
        copies.append((slice(at, at + count * PAGE_TOKENS), slice(page, page + count)))
    return copies


def as_pages(kv: Tensor) -> Tensor:
    """View [tokens, 2, kv_heads, width] as pages, [2, pages, kv_heads, PAGE_TOKENS, width]."""
    return kv.unflatten(0, (-1, PAGE_TOKENS)).permute(2, 0, 3, 1, 4)


def append_tokens(pool: Tensor, new: NewTokens, kv: Tensor) -> None:
    """Append keys and values, [tokens, 2, kv_heads, width], to pages; pool: as for NewTokens."""
    for tokens, places in new.runs:
        pool.view(-1, pool.shape[-1]).index_put_((places,), kv[tokens])
    for tokens, pages in new.pages:
        pool[:, pages].copy_(as_pages(kv[tokens]))
