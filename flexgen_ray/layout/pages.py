"""Pages of the KV cache: which row has which of them, on which tier.

A page holds PAGE_TOKENS of one row's tokens, in every layer of a kind; each tier of a stage has a
pool of them for each kind. A row has its home on one tier, with pages for the tokens that it has.
Rows enter, grow and leave only where a pass of their batch is composed, in program order;
admission.py decides which.

Two batches of a block, in a pool of 8 pages on the GPU (g0 to g7) and 8 in host memory (c0 to c7),
half of each batch's pages on either tier:

    batch 0   row of 40 tokens   3 pages   g0 g1 g2
              row of 60 tokens   4 pages   c0 c1 c2 c3
    batch 1   row of 70 tokens   5 pages   g3 g4 g5 g6 g7
              row of 20 tokens   2 pages   c4 c5

In layers with a window of 20 tokens a row has 3 pages at most, for a window touches no more. Then
it takes them again in turn: the row of 70 tokens has g3 g4 g5, its tokens 48 to 63 lie in g3, where
those of 0 to 15 lay, and tokens 64 to 69 in g4.

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

ALL_PAGES = 2**31 - 1  # more than a row ever has
BOTH = "both"  # place of a prefix that has pages on the device, and a copy in host memory
PLACES = (*TIERS, BOTH)


def pages_of(tokens: float) -> int:
    """Pages that so many tokens of one row take."""
    return int(-(-tokens // PAGE_TOKENS))


@dataclass(frozen=True)
class LayerKind:
    """Kind of decoder layers, in which rows have pages of their own.

    number: of the kind in its stage. window: number of tokens that a token attends, itself
    included; None for all.
    """

    number: int = 0
    window: int | None = None

    @cached_property
    def most_pages(self) -> int:
        """Most pages of a row, which takes them again in turn; a window touches no more."""
        return ALL_PAGES if self.window is None else pages_of(self.window - 1) + 1

    def pages_of(self, tokens: float) -> int:
        """Pages that so many tokens of one row take."""
        return min(pages_of(tokens), self.most_pages)

    def first_page(self, position: int) -> int:
        """First of a row's pages that the token at a position attends."""
        return 0 if self.window is None else max(0, position + 1 - self.window) // PAGE_TOKENS


FULL = LayerKind()


@dataclass(frozen=True)
class CacheSpace:
    """Room of a stage for cached rows, in pages.

    kinds: of the stage's layers; rows have the most pages in the first. pools: by kind, the pages
    of each tier's pool, in the order of TIERS.
    splits: number of equal rows of each batch on the tiers; the proportions that its pages keep.
    batch_pages: a batch's share of the pages of all tiers together, in the first kind.
    streamed: pages of a batch's rows that must be streamed to the device; disk: of rows on disk;
    both in the first kind, and the others take no more.
    streams_all: True if rows in host memory must all be streamed.
    disk_rows: rows on disk, all batches together.
    prefix_pages: pages of prefixes that rows share, in each kind and beyond `pools`. prefix_tiers:
    the tiers on which they have so many; prefix_slot: pages that a batch has streamed to the
    device, 0 if none are.
    """

    kinds: tuple[LayerKind, ...]
    pools: tuple[tuple[int, int, int], ...]
    splits: tuple[RowSplit, ...]
    batch_pages: int
    streamed: int
    disk: int
    streams_all: bool
    disk_rows: int
    prefix_pages: int = 0
    prefix_tiers: tuple[str, ...] = ("gpu",)
    prefix_slot: int = 0

    @property
    def all_pools(self) -> tuple[tuple[int, int, int], ...]:
        """By kind, the pages of each tier's pool with those of prefixes."""
        more = tuple(self.prefix_pages * (tier in self.prefix_tiers) for tier in TIERS)
        return tuple(
            (gpu + more[0], cpu + more[1], disk + more[2]) for gpu, cpu, disk in self.pools
        )

    @property
    def pages(self) -> tuple[int, int, int]:
        """Pages of each tier's pool in the first kind, in the order of TIERS."""
        return self.pools[0]


class Home:
    """Place of a row's cache in a stage, in the layers of one kind.

    tier: one of TIERS; pages: the row's pages in the tier's pool, in the order of its tokens; tail:
    place of a row on disk for its newest page, which is in host memory, else -1. most: number of
    pages after which they are taken again in turn. copy: pages of a prefix in host memory that has
    them on the device, too.
    """

    def __init__(
        self,
        tier: str,
        pages: tuple[int, ...],
        tail: int = -1,
        most: int = ALL_PAGES,
        copy: Home | None = None,
    ) -> None:
        self.tier = tier
        self.pages = pages
        self.tail = tail
        self.most = most
        self.copy = copy
        self._table: np.ndarray | None = None

    def on(self, tier: str) -> Home | None:
        """Pages on a tier; None if there are none."""
        if tier == self.tier:
            return self
        return self.copy.on(tier) if self.copy else None

    def page(self, index: int) -> int:
        """Page with the row's tokens from PAGE_TOKENS * index on."""
        return self.pages[index % self.most]

    def table(self, count: int) -> np.ndarray:
        """Pages of the row's tokens up to PAGE_TOKENS * count, int32 [count]."""
        if self._table is None:
            self._table = np.array(self.pages, np.int32)
        if count > len(self._table):
            # All pages are taken, and again in turn; a little further than is asked for now.
            self._table = np.tile(self._table, 1 + -(-count // len(self._table)))
        return self._table[:count]

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the first, page, count) of neighbouring pages among pages first..last."""
        pages: Sequence[int] = self.pages[first:last]
        if last > len(self.pages):
            pages = [self.page(index) for index in range(first, last)]
        start = 0
        for index, (page, following) in enumerate(pairwise(pages), 1):
            if following != page + 1:
                yield first + start, pages[start], index - start
                start = index
        if pages:
            yield first + start, pages[start], len(pages) - start


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

    def take(self, count: int, wanted: int | None = None) -> tuple[int, ...]:
        """Take pages from the smallest run that has room, or else from the largest runs.

        wanted: the page that is taken first if it is free and those after it suffice.
        """
        assert 0 < count <= self.free, f"{count} pages of {self.free} that are free"
        self.free -= count
        if wanted is not None and self._take_from(wanted, count):
            return tuple(range(wanted, wanted + count))
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

    def _take_from(self, page: int, count: int) -> bool:
        """Take neighbouring pages from one on; False if they aren't all free."""
        place = bisect_left(self._runs, (page + 1, 0)) - 1
        if place < 0 or page + count > self._runs[place][1]:
            return False
        start, stop = self._runs[place]
        left = (start, page), (page + count, stop)
        self._runs[place : place + 1] = [run for run in left if run[0] < run[1]]
        return True

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


@dataclass(frozen=True)
class SharedHome:
    """Place of a prefix that rows share, in the layers of one kind.

    number: of the prefix. start, end: tokens before it, and those up to its end. home: its pages.
    """

    number: int
    start: int
    end: int
    home: Home


class StagePages:
    """Homes of all rows in one stage; what it does depends only on the order of the calls.

    A prefix that rows share is computed as a row of its own, which then needs no slot.
    """

    def __init__(self, space: CacheSpace) -> None:
        self._space = space
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._pools = [
            dict(zip(TIERS, map(PagePool, pages), strict=True)) for pages in self._space.all_pools
        ]
        self._chains: dict[tuple[int, int], tuple[int, ...]] = {}
        self._prefixes: dict[int, tuple[SharedHome, ...]] = {}
        self._tails = list(range(self._space.disk_rows))[::-1]
        self._homes: dict[tuple[int, int], tuple[Home, ...]] = {}

    def homes(self, batch: int, slot: int) -> tuple[Home, ...]:
        """Homes of the row in a slot, by kind of layer; all on one tier, with one tail."""
        return self._homes[batch, slot]

    def prefixes(self, batch: int, slot: int) -> tuple[tuple[SharedHome, ...], ...]:
        """By kind of layer, the prefixes that precede a row's own tokens, in their order."""
        shared = [self._prefixes[number] for number in self._chains.get((batch, slot), ())]
        return tuple(zip(*shared, strict=True)) or ((),) * len(self._space.kinds)

    def enter(
        self, batch: int, slot: int, count: int, tier: str, chain: tuple[int, ...] = ()
    ) -> None:
        """Give a row its homes, with pages for as many tokens as `count` pages hold.

        tier: one of PLACES. chain: numbers of the prefixes that precede its own tokens.
        """
        if chain:
            self._chains[batch, slot] = chain
        tail = self._tails.pop() if tier == "disk" else -1
        homes = []
        for kind, pools in zip(self._space.kinds, self._pools, strict=True):
            pages, most = min(count, kind.most_pages), kind.most_pages
            copy = Home("cpu", pools["cpu"].take(pages), most=most) if tier == BOTH else None
            own = "gpu" if tier == BOTH else tier
            homes.append(Home(own, pools[own].take(pages), tail, most, copy))
        self._homes[batch, slot] = tuple(homes)

    def grow(self, batch: int, slot: int, count: int) -> None:
        """Give a row more pages, which follow its last one if that is free.

        In kinds in which it has all that it may have, it gets none.
        """
        grown = []
        pairs = zip(self._space.kinds, self._homes[batch, slot], self._pools, strict=True)
        for kind, home, pools in pairs:
            more = min(count, kind.most_pages - len(home.pages))
            if more:
                pages = home.pages + pools[home.tier].take(more, home.pages[-1] + 1)
                home = Home(home.tier, pages, home.tail, kind.most_pages)
            grown.append(home)
        self._homes[batch, slot] = tuple(grown)

    def move(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        """Note that a row with its pages is in another (batch, slot)."""
        self._homes[after] = self._homes.pop(before)
        if before in self._chains:
            self._chains[after] = self._chains.pop(before)

    def complete(self, batch: int, slot: int, number: int, tokens: int) -> None:
        """Note that a row is complete as the prefix of this number, with so many tokens of its own.

        It needs its slot no longer.
        """
        chain = self._chains.pop((batch, slot), ())
        start = self._prefixes[chain[-1]][0].end if chain else 0
        homes = self._homes.pop((batch, slot))
        self._prefixes[number] = tuple(
            SharedHome(number, start, start + tokens, home) for home in homes
        )

    def drop(self, number: int) -> None:
        """Take back the pages of a prefix."""
        for shared, pools in zip(self._prefixes.pop(number), self._pools, strict=True):
            _give(pools, shared.home)

    def leave(self, batch: int, slot: int) -> None:
        """Take back what a row had."""
        homes = self._homes.pop((batch, slot))
        self._chains.pop((batch, slot), None)
        for home, pools in zip(homes, self._pools, strict=True):
            _give(pools, home)
        if homes[0].tail >= 0:
            self._tails.append(homes[0].tail)


def _give(pools: dict[str, PagePool], home: Home) -> None:
    """Give the pages of a home back, and those of its copy."""
    pools[home.tier].give(home.pages)
    if home.copy:
        _give(pools, home.copy)
