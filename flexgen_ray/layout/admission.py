"""Admission: which rows enter a batch, and which grow, so that pages suffice in every stage.

A row has pages for the tokens that it has, and takes another when these are full. So rows may enter
whose final lengths together would not fit, as long as some of them end before the others are that
long. `peak_pages` looks ahead: with rows of 16 and 48 tokens so far, which end with 64 and 64,

    tokens from now on     0    16 (the second ends)    48 (the first ends)
    pages of the first     1     2                       4
    pages of the second    3     4                       -
    together               4     6                       4         so the peak is 6 pages, not 8

Rows count with the ends that are expected of them (answers.py). Equal rows would all be longest at
the same time; where many wait, they enter one by one (`Admission.pace`).

The first stage keeps the books of all stages, for the homes of a row differ from stage to stage.
Knows rows by their lengths; neither requests nor the numbers of pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flexgen_ray.config import PAGE_TOKENS, TIERS
from flexgen_ray.layout.pages import ALL_PAGES, BOTH, PLACES, CacheSpace, pages_of

MIXED = 0.25  # deviation of answers' lengths, as a share of their mean, of a mixed job
PACE = 0.98  # of the pace at which rows that enter one by one would need every page
_GPU, _CPU, _DISK = range(len(TIERS))
Key = tuple[int, int]  # batch and slot


class GrowingRow(Protocol):
    """A row: its tokens now, those that it is expected to end with, and ends with at most.

    While it is under way, these change only where its own batch is composed: tokens of other
    batches arrive sooner or later, and decisions must not depend on that.
    """

    @property
    def num_tokens(self) -> int: ...
    @property
    def expected_tokens(self) -> int: ...
    @property
    def final_tokens(self) -> int: ...


def peak_pages(rows: Iterable[GrowingRow], most: int = ALL_PAGES) -> int:
    """Most pages that rows have at a time, if each gets one token a pass until its expected end.

    most: most pages of a row. Rows that come to have them count as if they had them now, which may
    be a few pages too many; never too few.
    """
    pairs = [(row.num_tokens, row.expected_tokens) for row in rows]
    if not pairs:
        return 0
    now, final = np.array(pairs).T
    order = np.argsort(now - final)
    # Before the pass at which a row ends, it and those before it in this order are under way.
    now, passes, final = now[order], (final - now)[order], final[order]
    grows = final <= most * PAGE_TOKENS
    count = grows.cumsum()
    whole = (np.where(grows, now // PAGE_TOKENS, most)).cumsum() + count * (passes // PAGE_TOKENS)
    # A row has `now % PAGE_TOKENS` tokens of its last page now, and so many more at the end.
    more = passes % PAGE_TOKENS
    has_at_most = grows[:, None] & (now[:, None] % PAGE_TOKENS <= np.arange(PAGE_TOKENS))
    at_most = has_at_most.cumsum(0)
    begun = np.where(more, count, count - at_most[:, 0])
    begun += np.where(more, count - at_most[np.arange(len(now)), -more], 0)
    return int((whole + begun).max())


@dataclass
class _Entry:
    """A row that has entered.

    pages: of the row in layers that attend all tokens, and first_pages, those that it had at first.
    """

    row: GrowingRow
    tier: int
    pages: int
    first_pages: int


class _Limit:
    """Pages that rows may have in layers of a kind, and the rows whose pages count.

    most: most pages of a row.
    """

    def __init__(self, pages: int, most: int) -> None:
        self.pages, self.most = pages, most
        self.held = 0
        self.entries: dict[Key, _Entry] = {}

    def enter(self, key: Key, entry: _Entry) -> None:
        self.entries[key] = entry
        self.held += min(entry.pages, self.most)

    def leave(self, key: Key) -> None:
        self.held -= min(self.entries.pop(key).pages, self.most)

    def has_room(self, row: GrowingRow) -> bool:
        """True if a row finds pages now, alone fits at its end, and with the others at the peak."""
        if self.held + min(pages_of(row.num_tokens), self.most) > self.pages:
            return False
        if min(pages_of(row.final_tokens), self.most) > self.pages:
            return False
        rows = [*(it.row for it in self.entries.values()), row]
        ends = sum(min(pages_of(it.expected_tokens), self.most) for it in rows)
        return ends <= self.pages or peak_pages(rows, self.most) <= self.pages

    def stops(self, entry: _Entry) -> bool:
        """True if a row that is counted would take another page, and there is none."""
        return self.held >= self.pages and entry.pages < self.most


class _Books:
    """Pages of one stage: those that rows have, and those that are free.

    A row counts against the pool of its tier, in each kind of layers; if it is streamed, against
    its batch's slot too, and if it is on disk, against what its batch may have there. These two are
    counted in the first kind of layers, for in the second they take no more.
    """

    def __init__(self, space: CacheSpace) -> None:
        self._space = space
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        space = self._space
        self.entries: dict[Key, _Entry] = {}
        self._free_tails = space.disk_rows
        first, batches = space.kinds[0].most_pages, len(space.splits)
        streamed = [_Limit(space.streamed, first) for _ in range(batches)]
        on_disk = [_Limit(space.disk, first) for _ in range(batches)]
        pools = [
            [_Limit(pages[tier], kind.most_pages)
             for kind, pages in zip(space.kinds, space.pools, strict=True)]
            for tier in range(len(TIERS))
        ]  # fmt: skip
        in_memory = [*pools[_CPU]]
        self._limits = [
            (
                pools[_GPU],
                [*in_memory, streamed[batch]] if space.streams_all else in_memory,
                [*pools[_DISK], streamed[batch], on_disk[batch]],
            )
            for batch in range(batches)
        ]
        self._held = [[0] * len(TIERS) for _ in range(batches)]  # by batch, in the first kind

    def has_share(self, batch: int, rows: Sequence[tuple[GrowingRow, int]]) -> bool:
        """True if a batch has no more than its share of pages with (row, number of such rows).

        Each counts as half grown.
        """
        own = [it for (of, _), it in self.entries.items() if of == batch]
        held = sum(self._mean_pages(it.first_pages, it.row) for it in own)
        more = sum(count * self._mean_pages(pages_of(row.num_tokens), row) for row, count in rows)
        return held + more <= self._space.batch_pages

    def num_rows(self, row: GrowingRow) -> tuple[float, float]:
        """Rows like this one for which there are pages, if they enter together, and one by one."""
        pages, most = sum(self._space.pages), self._space.kinds[0].most_pages
        together = min(pages_of(row.expected_tokens), most)
        # A row has half of its last page, on average.
        return pages / together, pages / (self._mean_pages(pages_of(row.num_tokens), row) + 0.5)

    def _mean_pages(self, first: int, row: GrowingRow) -> float:
        """Pages of a row that had `first` at first, on average, in the first kind of layers."""
        most = self._space.kinds[0].most_pages
        return (min(first, most) + min(pages_of(row.expected_tokens), most)) / 2

    def tier_for(self, batch: int, row: GrowingRow) -> int | None:
        """Tier on which a row gets pages now, and can grow later; None if there is none.

        It is the one that lags most behind its share of the batch's pages.
        """
        held = self._held[batch]
        count = min(pages_of(row.num_tokens), self._space.kinds[0].most_pages)
        shares, total = self._space.splits[batch].tiers, sum(held) + count
        lags = [total * shares[it] / sum(shares) - held[it] for it in range(len(TIERS))]
        order = sorted(range(len(TIERS)), key=lambda it: -lags[it])
        return next((it for it in order if self._has_room(batch, it, row)), None)

    def _has_room(self, batch: int, tier: int, row: GrowingRow) -> bool:
        if tier == _DISK and not self._free_tails:
            return False
        return all(limit.has_room(row) for limit in self._limits[batch][tier])

    def enter(self, key: Key, row: GrowingRow, tier: int) -> None:
        count = pages_of(row.num_tokens)
        self._put(key, _Entry(row, tier, count, count))

    def _put(self, key: Key, entry: _Entry) -> None:
        self.entries[key] = entry
        self._free_tails -= entry.tier == _DISK
        self._held[key[0]][entry.tier] += min(entry.pages, self._space.kinds[0].most_pages)
        for limit in self._limits[key[0]][entry.tier]:
            limit.enter(key, entry)

    def leave(self, key: Key) -> _Entry:
        entry = self.entries.pop(key)
        self._free_tails += entry.tier == _DISK
        self._held[key[0]][entry.tier] -= min(entry.pages, self._space.kinds[0].most_pages)
        for limit in self._limits[key[0]][entry.tier]:
            limit.leave(key)
        return entry

    def move(self, before: Key, after: Key) -> None:
        self._put(after, self.leave(before))

    def can_grow(self, key: Key) -> bool:
        """True if the row can have one page more, wherever it takes another."""
        entry = self.entries[key]
        return not any(it.stops(entry) for it in self._limits[key[0]][entry.tier])

    def grow(self, key: Key) -> None:
        entry = self.entries[key]
        self._held[key[0]][entry.tier] += entry.pages < self._space.kinds[0].most_pages
        for limit in self._limits[key[0]][entry.tier]:
            limit.held += entry.pages < limit.most
        entry.pages += 1

    def helps(self, victim: Key, lacking: Key) -> bool:
        """True if the victim's pages count against a limit that the other row has reached."""
        entry = self.entries[lacking]
        limits = self._limits[lacking[0]][entry.tier]
        return any(it.stops(entry) and victim in it.entries for it in limits)

    def may_move(self, key: Key) -> bool:
        """True if a row may change its batch, whose slots limit no pages of such rows."""
        tier = self.entries[key].tier
        return len(self._limits[key[0]][tier]) == len(self._space.kinds)


class Admission:
    """Decides for all stages of a ring which rows enter, and which get another page."""

    def __init__(self, spaces: Sequence[CacheSpace]) -> None:
        self._spaces = spaces
        self._books = [_Books(space) for space in spaces]
        self._prefixes: set[Key] = set()
        self._rows: dict[Key, GrowingRow] = {}

    @property
    def prefix_pages(self) -> int:
        """Pages that prefixes may have in every stage, beside those of rows."""
        return min(space.prefix_pages for space in self._spaces)

    @property
    def prefix_slot(self) -> int | None:
        """Pages of prefixes that a batch may have streamed to the devices; None if none are."""
        slots = (space.prefix_slot for space in self._spaces if space.prefix_slot)
        return min(slots, default=None)

    @property
    def prefix_places(self) -> tuple[int, ...]:
        """Index in PLACES of the place of prefixes, for each stage."""
        places = (space.prefix_tiers for space in self._spaces)
        return tuple(PLACES.index(BOTH if len(it) > 1 else it[0]) for it in places)

    def begin_prefix(self, batch: int, slot: int) -> None:
        """Note that a slot is taken by a prefix, whose pages count nowhere here."""
        self._prefixes.add((batch, slot))

    def end_prefix(self, batch: int, slot: int) -> None:
        """Note that the slot of a prefix is free."""
        self._prefixes.remove((batch, slot))

    def clear(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self._prefixes.clear()
        for books in self._books:
            books.clear()

    def has_share(self, batch: int, *rows: tuple[GrowingRow, int]) -> bool:
        """True if with (row, number of such rows) a batch has no more than its share of pages."""
        return all(books.has_share(batch, rows) for books in self._books)

    def pace(self, row: GrowingRow, waiting: int, slots: int) -> float | None:
        """Rows that enter all batches in a pass if they should enter one by one, else None.

        row: like it are all that wait. waiting: number of them. slots: of all batches.
        Rows of equal lengths that enter together need their last pages together. If they enter one
        by one, pages suffice for as many as if each were half grown; but fewer are under way until
        the first ends, and after the last entered. So it pays where many wait.
        """
        pairs = [books.num_rows(row) for books in self._books]
        together, apart = (min(slots, *counts) for counts in zip(*pairs, strict=True))
        if waiting / together <= waiting / apart + 1:
            return None
        return PACE * apart / (row.expected_tokens - row.num_tokens + 1)

    def enters(self, batch: int, slot: int, row: GrowingRow) -> tuple[int, ...] | None:
        """Let a row enter if every stage has pages for it now, and is expected to have them later.

        Returns the index in TIERS of its tier in each stage; None if it doesn't enter.
        """
        tiers = [books.tier_for(batch, row) for books in self._books]
        chosen = tuple(tier for tier in tiers if tier is not None)
        if len(chosen) < len(tiers):
            return None
        self._rows[batch, slot] = row
        for books, tier in zip(self._books, chosen, strict=True):
            books.enter((batch, slot), row, tier)
        return chosen

    def may_move(self, batch: int) -> bool:
        """True if the rows of a batch may go to others."""
        keys = [key for key in self._rows if key[0] == batch]
        return all(books.may_move(key) for books in self._books for key in keys)

    def free_slots(self, batch: int, size: int) -> list[int]:
        """Slots of a batch without a row, of `size`."""
        taken = {slot for of, slot in [*self._rows, *self._prefixes] if of == batch}
        return [slot for slot in range(size) if slot not in taken]

    def move(self, before: Key, after: Key) -> None:
        """Give a row another batch and slot; it stays where it lies."""
        self._rows = {after if key == before else key: row for key, row in self._rows.items()}
        for books in self._books:
            books.move(before, after)

    @property
    def oldest(self) -> Key:
        """Batch and slot of the row that entered first."""
        return next(iter(self._rows))

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
        del self._rows[batch, slot]
        for books in self._books:
            books.leave((batch, slot))

    def tier(self, batch: int, slot: int) -> int:
        """Index in TIERS of a row's tier in the first stage."""
        if (batch, slot) in self._prefixes:
            return TIERS.index(self._spaces[0].prefix_tiers[0])
        return self._books[0].entries[batch, slot].tier


def are_alike(answers: Iterable[float]) -> bool:
    """True if answers of these lengths, begun together, end together."""
    lengths = np.fromiter(answers, float)
    return not len(lengths) or bool(lengths.std() < MIXED * lengths.mean())


def mean_cached(lengths: Sequence[tuple[int, int]], are_apart: bool = False) -> float:
    """Mean tokens of a row's cache while a job of (prompt, answer) lengths runs.

    A row that stays for longer counts for longer. Rows of a mixed job are at different points of
    their answers, so on average half of each is there; equal ones grow together, and count whole,
    unless `are_apart` says that they enter one by one.
    """
    prompts, answers = np.array(lengths, float).T
    grown = 1.0 if are_alike(answers) and not are_apart else 0.5
    total = answers.sum()
    if not total:
        return float(prompts.mean())
    tokens = (answers * (prompts + grown * answers)).sum() / total
    return min(float(tokens) + (grown < 1) * PAGE_TOKENS / 2, float((prompts + answers).max()))
