"""Admission: which rows enter a batch, and which grow, so that pages suffice in every stage.

A row has pages for the tokens that it has, and takes another when these are full. So rows may enter
whose final lengths together would not fit, as long as some of them end before the others are that
long. `peak_pages` looks ahead: with rows of 16 and 48 tokens so far, which end with 64 and 64,

    tokens from now on     0    16 (the second ends)    48 (the first ends)
    pages of the first     1     2                       4
    pages of the second    3     4                       -
    together               4     6                       4         so the peak is 6 pages, not 8

The first stage keeps the books of all stages, for the homes of a row differ from stage to stage.
Knows rows by their lengths; neither requests nor the numbers of pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flexgen_ray.config import PAGE_TOKENS, TIERS
from flexgen_ray.layout.pages import ALL_PAGES, CacheSpace, pages_of

MIXED = 0.25  # deviation of answers' lengths, as a share of their mean, of a mixed job
POINTS = 32  # ends of rows at which the pages of all are added up
_GPU, _CPU, _DISK = range(len(TIERS))
Key = tuple[int, int]  # batch and slot


class GrowingRow(Protocol):
    """A row as admission sees it: its tokens now, and those that it ends with at most."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def final_tokens(self) -> int: ...


def peak_pages(rows: Iterable[GrowingRow], most: int = ALL_PAGES) -> int:
    """Most pages that rows have at a time, if each gets one token a pass until its end.

    most: most pages of a row.
    Rows with more than POINTS different ends may count as a few pages too many; never too few.
    """
    pairs = [(row.num_tokens, row.final_tokens) for row in rows]
    if not pairs:
        return 0
    now, final = np.array(pairs).T
    left = final - now
    ends = np.unique(left)
    if len(ends) > POINTS:
        ends = ends[np.linspace(0, len(ends) - 1, POINTS).round().astype(int)]
    before = np.concatenate(([-1], ends[:-1]))
    tokens = np.minimum(now[:, None] + ends, final[:, None])
    pages = np.minimum(-(-tokens // PAGE_TOKENS), most) * (left[:, None] > before)
    return int(pages.sum(0).max())


@dataclass
class _Entry:
    """A row that has entered.

    pages: of the row in layers that attend all tokens; mean: their mean until its end, in the first
    kind of layers.
    """

    row: GrowingRow
    tier: int
    pages: int
    mean: float


@dataclass
class _Limit:
    """Pages that rows may have in layers of a kind.

    most: most pages of a row; entries: rows whose pages count.
    """

    pages: int
    most: int
    entries: list[_Entry]

    @property
    def held(self) -> int:
        """Pages that the rows have."""
        return sum(min(it.pages, self.most) for it in self.entries)

    def fits(self, row: GrowingRow) -> bool:
        """True if the rows stay within the limit until their ends, this one among them."""
        rows = [*(it.row for it in self.entries), row]
        final = [min(pages_of(it.final_tokens), self.most) for it in rows]
        if final[-1] > self.pages:
            return False
        return sum(final) <= self.pages or peak_pages(rows, self.most) <= self.pages

    def stops(self, entry: _Entry) -> bool:
        """True if a row that is counted would take another page, and there is none."""
        return entry.pages < self.most and self.held >= self.pages


class _Books:
    """Pages of one stage: those that rows have, and those that are free."""

    def __init__(self, space: CacheSpace) -> None:
        self._space = space
        self.clear()

    def clear(self) -> None:
        self.entries: dict[Key, _Entry] = {}
        self._free_tails = self._space.disk_rows

    def has_share(self, batch: int, rows: Sequence[tuple[GrowingRow, int]]) -> bool:
        """True if a batch has no more than its share of pages with (row, number of such rows).

        Each counts as half grown.
        """
        held = sum(it.mean for (of, _), it in self.entries.items() if of == batch)
        more = sum(count * self.mean_pages(row) for row, count in rows)
        return held + more <= self._space.batch_pages

    def mean_pages(self, row: GrowingRow) -> float:
        """Pages of a row, in the first kind of layers, at half of the growth that is left."""
        most = self._space.kinds[0].most_pages
        return (min(pages_of(row.num_tokens), most) + min(pages_of(row.final_tokens), most)) / 2

    def tier_for(self, batch: int, row: GrowingRow) -> int | None:
        """Tier on which a row gets pages now, and can grow later; None if there is none.

        It is the one that lags most behind its share of the batch's pages.
        """
        held, most = [0, 0, 0], self._space.kinds[0].most_pages
        for (of, _), entry in self.entries.items():
            held[entry.tier] += min(entry.pages, most) * (of == batch)
        count = min(pages_of(row.num_tokens), most)
        shares, total = self._space.splits[batch].tiers, sum(held) + count
        lags = [total * shares[it] / sum(shares) - held[it] for it in range(len(TIERS))]
        order = sorted(range(len(TIERS)), key=lambda it: -lags[it])
        return next((it for it in order if self._has_room(batch, it, row)), None)

    def _has_room(self, batch: int, tier: int, row: GrowingRow) -> bool:
        """True if a row finds pages now, alone fits at its end, and with the others at the peak."""
        if tier == _DISK and not self._free_tails:
            return False
        now = pages_of(row.num_tokens)
        limits = self._limits(batch, tier)
        return all(it.held + min(now, it.most) <= it.pages and it.fits(row) for it in limits)

    def _limits(self, batch: int, tier: int) -> list[_Limit]:
        """Limits of what a batch's row on a tier takes.

        Rows that are streamed, and those on disk, are limited in the first kind of layers, for in
        the second they take no more.
        """
        space, streamed = self._space, (_CPU, _DISK) if self._space.streams_all else (_DISK,)
        most, entries = space.kinds[0].most_pages, self._entries((tier,))
        limits = [
            _Limit(pages[tier], kind.most_pages, entries)
            for kind, pages in zip(space.kinds, space.pools, strict=True)
        ]
        if tier in streamed:
            limits.append(_Limit(space.streamed, most, self._entries(streamed, batch)))
        if tier == _DISK:
            limits.append(_Limit(space.disk, most, self._entries((_DISK,), batch)))
        return limits

    def _entries(self, tiers: Sequence[int], batch: int | None = None) -> list[_Entry]:
        pairs = self.entries.items()
        return [it for (of, _), it in pairs if it.tier in tiers and batch in (None, of)]

    def enter(self, key: Key, row: GrowingRow, tier: int) -> None:
        self.entries[key] = _Entry(row, tier, pages_of(row.num_tokens), self.mean_pages(row))
        self._free_tails -= tier == _DISK

    def can_grow(self, key: Key) -> bool:
        """True if the row can have one page more, wherever it takes another."""
        entry = self.entries[key]
        return not any(it.stops(entry) for it in self._limits(key[0], entry.tier))

    def helps(self, victim: Key, lacking: Key) -> bool:
        """True if the victim's pages count against a limit that the other row has reached."""
        own, entry = self.entries[victim], self.entries[lacking]
        limits = self._limits(lacking[0], entry.tier)
        return any(it.stops(entry) and any(own is each for each in it.entries) for it in limits)

    def grow(self, key: Key) -> None:
        self.entries[key].pages += 1

    def leave(self, key: Key) -> None:
        self._free_tails += self.entries.pop(key).tier == _DISK


class Admission:
    """Decides for all stages of a ring which rows enter, and which get another page."""

    def __init__(self, spaces: Sequence[CacheSpace]) -> None:
        self._books = [_Books(space) for space in spaces]

    def clear(self) -> None:
        """Forget all rows."""
        for books in self._books:
            books.clear()

    def has_share(self, batch: int, *rows: tuple[GrowingRow, int]) -> bool:
        """True if with (row, number of such rows) a batch has no more than its share of pages."""
        return all(books.has_share(batch, rows) for books in self._books)

    def enters(self, batch: int, slot: int, row: GrowingRow) -> tuple[int, ...] | None:
        """Let a row enter if every stage has pages for it now, and is expected to have them later.

        Returns the index in TIERS of its tier in each stage; None if it doesn't enter.
        """
        tiers = [books.tier_for(batch, row) for books in self._books]
        chosen = tuple(tier for tier in tiers if tier is not None)
        if len(chosen) < len(tiers):
            return None
        for books, tier in zip(self._books, chosen, strict=True):
            books.enter((batch, slot), row, tier)
        return chosen

    def pages(self, batch: int, slot: int) -> int:
        """Pages of a row in layers that attend all tokens."""
        return self._books[0].entries[batch, slot].pages

    def grows(self, batch: int, slot: int) -> bool:
        """Give a row one page more if every stage has one; False if one hasn't."""
        if not all(books.can_grow((batch, slot)) for books in self._books):
            return False
        for books in self._books:
            books.grow((batch, slot))
        return True

    def helps(self, victim: Key, lacking: Key) -> bool:
        """True if another row, which lacks a page, could have one of the victim's in some stage."""
        return any(books.helps(victim, lacking) for books in self._books)

    def leave(self, batch: int, slot: int) -> None:
        """Take back what a row had in every stage."""
        for books in self._books:
            books.leave((batch, slot))

    def tier(self, batch: int, slot: int) -> int:
        """Index in TIERS of a row's tier in the first stage."""
        return self._books[0].entries[batch, slot].tier


def mean_cached(lengths: Sequence[tuple[int, int]]) -> float:
    """Mean tokens of a row's cache while a job of (prompt, answer) lengths runs.

    A row that stays for longer counts for longer. Rows of a mixed job are at different points of
    their answers, so on average half of each is there; equal ones grow together, and count whole.
    """
    prompts, answers = np.array(lengths, float).T
    grown = 0.5 if answers.std() >= MIXED * answers.mean() else 1.0
    total = answers.sum()
    if not total:
        return float(prompts.mean())
    tokens = (answers * (prompts + grown * answers)).sum() / total
    return min(float(tokens) + (grown < 1) * PAGE_TOKENS / 2, float((prompts + answers).max()))
