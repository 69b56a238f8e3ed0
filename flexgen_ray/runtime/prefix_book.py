"""Prefixes under way: which are computed, which rows and waiting requests use them, which may go.

A prefix is computed as a row of its own, in a pass of some batch. It is there for other rows when
that batch is composed again, for then all of its pages are written. Its pages are taken back when
no row and no waiting request uses it, or when others need them and no row under way does. Both
happen only where passes are composed, in program order. Knows prefixes, batches and slots; no
tokens of rows and no tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from flexgen_ray.request import Request
from flexgen_ray.runtime.prefixes import Prefix, find_prefixes

Key = tuple[int, int]  # batch and slot


class PrefixBook:
    """State of the prefixes of a run.

    pages: those that all prefixes may have at a time. slot_pages: those that a batch may have
    streamed to the device; None where none are streamed.
    """

    def __init__(self, pages: int, slot_pages: int | None) -> None:
        self._most, self._slot_pages = pages, slot_pages
        self.clear()

    def clear(self) -> None:
        """Forget all prefixes and rows."""
        self._of_request: dict[int, Prefix] = {}
        self._count = 0  # of all prefixes so far
        self._num_waiting = 0  # requests that share any
        self._free = self._most
        self._ready: dict[int, Prefix] = {}
        self._computed: dict[Key, Prefix] = {}
        self._rows: dict[Key, Prefix] = {}
        self._waiting: Counter[int] = Counter()  # requests that share a prefix
        self._under_way: Counter[int] = Counter()  # rows that read a prefix

    def add(self, requests: Iterable[Request]) -> None:
        """Find the prefixes of requests that begin to wait; those of earlier ones stay as they are.

        Requests that were added apart share none.
        """
        added = list(requests)
        for request in added:
            self._of_request.pop(request.index, None)
        most = self._most if self._slot_pages is None else min(self._most, self._slot_pages)
        if most:
            shared = find_prefixes(added, most, self._count)
            self._count += len(shared.prefixes)
            self._of_request |= shared.of_request
            for request in added:
                self.wait(request)

    @property
    def has_waiting(self) -> bool:
        """True if requests that share a prefix wait."""
        return self._num_waiting > 0

    def of(self, request: Request) -> Prefix | None:
        """Deepest prefix that a request shares."""
        return self._of_request.get(request.index)

    def is_ready(self, prefix: Prefix | None) -> bool:
        """True if a prefix and its parents are there for rows that enter."""
        return prefix is None or all(it.number in self._ready for it in prefix.chain)

    def fits_batch(self, prefix: Prefix | None, batch: int) -> bool:
        """True if a batch may read a prefix and its parents beside those that it reads now."""
        if prefix is None or self._slot_pages is None:
            return True
        read = [*prefix.chain]
        for (of, _), each in self._rows.items():
            read += each.chain if of == batch else ()
        for (of, _), each in self._computed.items():
            read += each.chain[:-1] if of == batch else ()
        return sum({it.number: it.pages for it in read}.values()) <= self._slot_pages

    def next_to_compute(self, prefix: Prefix) -> Prefix | None:
        """First prefix of a chain that is not there; None if it is being computed, or all are."""
        computed = {it.number for it in self._computed.values()}
        for each in prefix.chain:
            if each.number not in self._ready:
                return None if each.number in computed else each
        return None

    def begin(self, prefix: Prefix, key: Key, wanted: Collection[int]) -> list[int] | None:
        """Begin to compute a prefix in a slot, if pages for it are free or can be freed.

        wanted: prefixes that are not dropped, its own parents and those of requests before it.
        Returns the prefixes whose pages are taken back for that; None if they don't suffice, and
        then none is.
        """
        needed, dropped = prefix.pages - self._free, []
        for each in self._idle():
            if needed <= 0:
                break
            if each.number not in wanted:
                dropped.append(each.number)
                needed -= each.pages
        if needed > 0:
            return None
        for number in dropped:
            self._drop(number)
        self._free -= prefix.pages
        self._computed[key] = prefix
        self._use(prefix.chain[:-1], 1)
        return dropped

    def complete(self, key: Key) -> Prefix:
        """Note that a prefix is computed; returns it."""
        prefix = self._computed.pop(key)
        self._use(prefix.chain[:-1], -1)
        self._ready[prefix.number] = prefix
        return prefix

    def take_unused(self) -> list[int]:
        """Drop the prefixes that no row and no waiting request uses; returns their numbers."""
        unused = [it.number for it in self._idle() if not self._waiting[it.number]]
        for number in unused:
            self._drop(number)
        return unused

    def enter(self, prefix: Prefix | None, key: Key) -> None:
        """Note that a waiting request is a row now."""
        if prefix is not None:
            self._num_waiting -= 1
            self._waiting.subtract(it.number for it in prefix.chain)
            self._rows[key] = prefix
            self._use(prefix.chain, 1)

    def leave(self, key: Key) -> None:
        """Note that a row has left."""
        prefix = self._rows.pop(key, None)
        if prefix is not None:
            self._use(prefix.chain, -1)

    def wait(self, request: Request) -> None:
        """Note that a request waits, perhaps again."""
        prefix = self.of(request)
        if prefix is not None:
            self._num_waiting += 1
            self._waiting.update(it.number for it in prefix.chain)

    def move(self, before: Key, after: Key) -> None:
        """Note that a row is in another batch and slot."""
        if before in self._rows:
            self._rows[after] = self._rows.pop(before)

    def may_move(self) -> bool:
        """True if rows may change their batch, whose prefixes are not limited then."""
        return self._slot_pages is None or not self._rows

    def _idle(self) -> list[Prefix]:
        """Prefixes that no row reads, children before their parents."""
        read, parents = self._under_way, set()
        for each in self._computed.values():
            parents |= {it.number for it in each.chain}
        idle = []
        for number in sorted(self._ready, reverse=True):
            prefix = self._ready[number]
            if read[number] or number in parents:
                parents |= {it.number for it in prefix.chain}
            else:
                idle.append(prefix)
        return idle

    def _drop(self, number: int) -> None:
        self._free += self._ready.pop(number).pages

    def _use(self, prefixes: Iterable[Prefix], change: int) -> None:
        for prefix in prefixes:
            self._under_way[prefix.number] += change
