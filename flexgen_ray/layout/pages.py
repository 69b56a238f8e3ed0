"""Pages of the KV cache: which row has which of them, on which tier, and who may enter.

A page holds PAGE_TOKENS of one row's tokens, in every layer of a stage; each tier of a stage has a
pool of them. A row has its home on one tier, with pages for as many tokens as it may come to have.
Rows enter and leave only where a pass of their batch is composed, in program order. So every stage,
and the first stage for all of them, derives the same homes from the same events.

Two batches of a block, in a pool of 8 pages on the GPU (g0 to g7) and 8 in host memory (c0 to c7),
half of each batch's pages on either tier:

    batch 0   row of 40 tokens   3 pages   g0 g1 g2
              row of 60 tokens   4 pages   c0 c1 c2 c3
    batch 1   row of 70 tokens   5 pages   g3 g4 g5 g6 g7
              row of 20 tokens   2 pages   c4 c5

Knows numbers of pages and rows; no tokens, bytes or tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from flexgen_ray.config import PAGE_TOKENS, TIERS
from flexgen_ray.layout.placement import RowSplit


def pages_of(tokens: float) -> int:
    """Pages that so many tokens of one row take."""
    return int(-(-tokens // PAGE_TOKENS))


@dataclass(frozen=True)
class CacheSpace:
    """Room of a stage for cached rows, in pages.

    pages: pages of each tier's pool, in the order of TIERS.
    splits: number of equal rows of each batch on the tiers; the proportions that its pages keep.
    batch_pages: a batch's share of the pages of all tiers together.
    streamed: pages of a batch's rows that must be streamed to the device; disk: of rows on disk.
    streams_all: True if rows in host memory must all be streamed.
    disk_rows: rows on disk, all batches together.
    """

    pages: tuple[int, int, int]
    splits: tuple[RowSplit, ...]
    batch_pages: int
    streamed: int
    disk: int
    streams_all: bool
    disk_rows: int


class Home:
    """Place of a row's cache in a stage.

    tier: one of TIERS; pages: the row's pages in the tier's pool, in the order of its tokens; tail:
    place of a row on disk for its newest page, which is in host memory, else -1.
    """

    def __init__(self, tier: str, pages: tuple[int, ...], tail: int = -1) -> None:
        self.tier = tier
        self.pages = pages
        self.tail = tail

    @cached_property
    def table(self) -> np.ndarray:
        """The pages as an int32 array."""
        return np.array(self.pages, np.int32)

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the first, page, count) of neighbouring pages among pages first..last."""
        start = first
        for index, (page, following) in enumerate(pairwise(self.pages[first:last]), first + 1):
            if following != page + 1:
                yield start, self.pages[start], index - start
                start = index
        if start < last:
            yield start, self.pages[start], last - start


def page_table(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Table of rows' pages, int32 [rows, most pages]; zeros beyond a row's own."""
    table = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for line, pages in zip(table, tables, strict=True):
        line[: len(pages)] = pages
    return table


class PagePool:
    """Free pages of one tier, handed out side by side where possible."""

    def __init__(self, count: int) -> None:
        self.free = count
        self._runs = [(0, count)] if count else []  # [start, stop) of free pages, in order

    def take(self, count: int) -> tuple[int, ...]:
        """Take pages from the smallest run that has room, or else from the largest runs."""
        assert 0 < count <= self.free, f"{count} pages of {self.free} that are free"
        self.free -= count
        taken: list[int] = []
        while len(taken) < count:
            left = count - len(taken)
            fitting = [run for run in self._runs if run[1] - run[0] >= left]
            if fitting:
                start, stop = min(fitting, key=lambda run: run[1] - run[0])
            else:
                start, stop = max(self._runs, key=lambda run: run[1] - run[0])
            place, end = self._runs.index((start, stop)), min(stop, start + left)
            taken += range(start, end)
            self._runs[place : place + 1] = [(end, stop)] if end < stop else []
        return tuple(taken)

    def give(self, pages: Iterable[int]) -> None:
        """Give pages back, which join the free runs beside them."""
        for page in sorted(pages):
            self.free += 1
            place = bisect_left(self._runs, (page, page))
            start, stop = page, page + 1
            if place < len(self._runs) and self._runs[place][0] == stop:
                stop = self._runs.pop(place)[1]
            if place and self._runs[place - 1][1] == start:
                place -= 1
                start = self._runs.pop(place)[0]
            self._runs.insert(place, (start, stop))


class StagePages:
    """Homes of all rows in one stage. Its answers depend only on the order of the calls."""

    def __init__(self, space: CacheSpace) -> None:
        self._space = space
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._pools = dict(zip(TIERS, map(PagePool, self._space.pages), strict=True))
        self._tails = list(range(self._space.disk_rows))[::-1]
        self._homes: dict[tuple[int, int], Home] = {}
        self._held = [dict.fromkeys(TIERS, 0) for _ in self._space.splits]

    def home(self, batch: int, slot: int) -> Home:
        """Home of the row in a slot."""
        return self._homes[batch, slot]

    def room(self, batch: int) -> int:
        """Pages that a batch may still take to have its share; not all of them may be free."""
        return self._space.batch_pages - sum(self._held[batch].values())

    def tier_for(self, batch: int, count: int) -> str | None:
        """Tier on which a row of the batch gets its pages; None if it can't enter now.

        It is the one that lags most behind its share of the batch's pages, of those with room.
        """
        held = self._held[batch]
        total = sum(held.values()) + count
        shares = self._space.splits[batch].tiers
        lags = [
            total * share / sum(shares) - held[tier]
            for share, tier in zip(shares, TIERS, strict=True)
        ]
        order = sorted(range(len(TIERS)), key=lambda number: -lags[number])
        return next(
            (TIERS[number] for number in order if self._has_room(TIERS[number], held, count)), None
        )

    def _has_room(self, tier: str, held: dict[str, int], count: int) -> bool:
        if self._pools[tier].free < count:
            return False
        space = self._space
        if tier == "disk" and (not self._tails or held["disk"] + count > space.disk):
            return False
        streamed = held["disk"] + held["cpu"] * space.streams_all + count
        is_streamed = tier == "disk" or (tier == "cpu" and space.streams_all)
        return not is_streamed or streamed <= space.streamed

    def enter(self, batch: int, slot: int, count: int) -> None:
        """Give a row its home; tier_for has said that it can enter."""
        tier = self.tier_for(batch, count)
        assert tier is not None, f"no room for {count} pages of batch {batch}"
        tail = self._tails.pop() if tier == "disk" else -1
        self._homes[batch, slot] = Home(tier, self._pools[tier].take(count), tail)
        self._held[batch][tier] += count

    def leave(self, batch: int, slot: int) -> None:
        """Take back what a row had."""
        home = self._homes.pop((batch, slot))
        self._pools[home.tier].give(home.pages)
        self._held[batch][home.tier] -= len(home.pages)
        if home.tail >= 0:
            self._tails.append(home.tail)


class Admission:
    """Decides for all stages of a ring which rows enter; no stage ever lacks pages then."""

    def __init__(self, spaces: Sequence[CacheSpace]) -> None:
        self._stages = [StagePages(space) for space in spaces]

    def clear(self) -> None:
        """Forget all rows."""
        for stage in self._stages:
            stage.clear()

    def room(self, batch: int) -> int:
        """Pages that a batch may still take to have its share in every stage; below 0 if none."""
        return min(stage.room(batch) for stage in self._stages)

    def enters(self, batch: int, slot: int, count: int) -> bool:
        """Let a row enter if every stage has pages for it; False if one hasn't."""
        if any(stage.tier_for(batch, count) is None for stage in self._stages):
            return False
        for stage in self._stages:
            stage.enter(batch, slot, count)
        return True

    def leave(self, batch: int, slot: int) -> None:
        """Take back what a row had in every stage."""
        for stage in self._stages:
            stage.leave(batch, slot)

    def tier(self, batch: int, slot: int) -> int:
        """Index in TIERS of a row's tier in the first stage."""
        return TIERS.index(self._stages[0].home(batch, slot).tier)
