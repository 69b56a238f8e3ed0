"""Tiles of the prefixes that a pass's decoding rows share, each read once for all of its rows.

Attention follows them, and the cost model counts by them. Knows rows and homes; no tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from flexgen_ray.layout.pages import SharedHome
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import MemoKey, PlacedRows, Row, first_attended
from flexgen_ray.layout.sizes import PREFIX_TILE, prefix_rows_at_a_time

User = tuple[Row, int]  # a row, and the first token of a tile that it attends, counted from there


class PrefixTile(NamedTuple):
    """Tokens of a prefix that are attended at a time, from `first` to before `last`.

    chunks: the decoding rows that attend any of them, those of a product together.
    """

    shared: SharedHome
    first: int
    last: int
    chunks: list[list[User]]


_TILES = MemoKey[list[PrefixTile]]()


def prefix_tiles(placed: PlacedRows, plan: StagePlan, window: int | None) -> list[PrefixTile]:
    """Tiles of all prefixes that the decoding rows of a pass attend; window: of the layer."""
    return placed.memoized(_TILES, lambda: _find_tiles(placed, plan, window), window)


def _find_tiles(placed: PlacedRows, plan: StagePlan, window: int | None) -> list[PrefixTile]:
    tiles, most = [], prefix_rows_at_a_time(plan)
    for shared, rows in placed.shared(window):
        firsts = [(row, first_attended(row, window)) for row in rows]
        begin = max(shared.start, min(first for _, first in firsts))
        for first in range(begin, shared.end, PREFIX_TILE):
            last = min(first + PREFIX_TILE, shared.end)
            users = [(row, max(0, start - first)) for row, start in firsts if start < last]
            chunks = [users[at : at + most] for at in range(0, len(users), most)]
            tiles.append(PrefixTile(shared, first, last, chunks))
    return tiles
