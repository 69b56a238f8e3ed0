"""The visits of a job: how many rows decode in each, and how many tokens of prompts it brings.

Requests enter as others end, so the number of visits follows from all lengths, not from their mean:
while requests wait, a block is full; once none waits, rows end one after the other, and the longest
answer sets the end. `visits_of` plays that with lengths alone. A block of 2 rows, with answers of
4, 2 and 1 tokens, and room for all prompts in a visit:

    visit        0              1            2               3
    first row    prompt         decodes      decodes         decodes
    second row   prompt         decodes      prompt (of 1)   -

Visits alike are counted together: a few kinds stand for all (`kinds_of`).
Knows lengths; no bytes, no seconds, no tokens.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from statistics import fmean
from typing import NamedTuple, TypeVar

from flexgen_ray.config import PAGE_TOKENS
from flexgen_ray.cost.bound import LEAST, prefilling_rows
from flexgen_ray.layout.admission import PACE, are_alike
from flexgen_ray.layout.pages import pages_of
from flexgen_ray.layout.plan import StagePlan

T = TypeVar("T")
Lengths = tuple[tuple[int, int], ...]

LEAST_PLAYED = 2048  # requests that are played, or more; of larger jobs the middle is repeated
FULL, FEW = 0.75, 0.25  # shares of the block's rows between which visits count as alike


@dataclass(frozen=True)
class Visits:
    """A number of visits that are alike.

    decoding: rows of the block that decode; prompt_tokens: of all prompts. Both are means.
    """

    count: float
    decoding: float
    prompt_tokens: float

    def mix(self, plan: StagePlan) -> dict[str, float]:
        """Such a visit as a sum of phases: {phase or LEAST: times that it counts}.

        A pass takes something even without rows, as its weights do. Each decoding row takes as much
        again as the difference of a full batch to one row says, and prompts as much as their share
        of a prefill pass.
        """
        batches, size = plan.num_batches, plan.policy.gpu_batch_size
        prompts = self.prompt_tokens / (batches * prefilling_rows(plan)[0].num_tokens)
        decode = (self.decoding / batches - 1 + prompts) / (size - 1) if size > 1 else 0.0
        return {"prefill": prompts, "decode": decode, LEAST: 1 - prompts - decode}


def spread(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, the first among them, at even distances; an item may come twice."""
    return [items[number * len(items) // count] for number in range(count)]


def kinds_of(plan: StagePlan, lengths: Lengths, num_requests: int) -> dict[str, Visits]:
    """{name: kind} of a job's visits by a stage's plan.

    lengths: as in `visits_of`. Empty if all requests are alike and fit one block, which begins and
    ends together, and share nothing.
    """
    rows = plan.num_batches * plan.policy.gpu_batch_size
    prefixes = _prefixes_of(plan)
    if lengths[0] == lengths[-1] and num_requests <= rows and not prefixes.tokens:
        return {}
    most_tokens = plan.num_batches * plan.cell_tokens
    kinds = visits_of(lengths, num_requests, rows, most_tokens, sum(plan.space.pages), prefixes)
    return {f"visits {number}": visits for number, visits in enumerate(kinds)}


class Prefixes(NamedTuple):
    """Prefixes that requests share, and that are computed as prompts of their own.

    tokens: for each request, on average. first: tokens of those that the first rows wait for;
    visits: for which they wait, one for each level of prefixes.
    """

    tokens: float = 0.0
    first: int = 0
    visits: int = 0


NO_PREFIXES = Prefixes()


def _prefixes_of(plan: StagePlan) -> Prefixes:
    sharing = plan.workload.sharing
    if sharing is None or not plan.prefix_pages:
        return NO_PREFIXES
    first = plan.prefix_pages * PAGE_TOKENS
    return Prefixes(sharing.tokens / sharing.num_requests, first, max(1, round(sharing.levels)))


@lru_cache(maxsize=1024)
def visits_of(
    lengths: Lengths,
    num_requests: int,
    rows: int,
    most_tokens: int,
    pages: int,
    prefixes: Prefixes = NO_PREFIXES,
) -> tuple[Visits, ...]:
    """Kinds of visits of a job.

    lengths: (prompt, answer) of some requests that stand for all num_requests, the longest first.
    rows: of a block; most_tokens: that it brings in a visit; pages: of its cache. prefixes: what
    the lengths don't count.
    """
    # The longest answers begin when few requests wait; before that, and at both ends, blocks fill.
    longest, mean = max(answer for _, answer in lengths), fmean(answer for _, answer in lengths)
    enough = max(LEAST_PLAYED, ceil(rows * (2 + longest / mean)))
    played = spread(lengths, min(num_requests, enough))
    timeline = _Timeline(played, rows, most_tokens, pages)
    timeline.prefill_first(prefixes)
    timeline.play()
    total = num_requests / len(lengths) * sum(answer for _, answer in lengths)
    return timeline.kinds(total)


class _Timeline:
    """Plays a job visit by visit; visits in which nothing begins or ends are taken together."""

    def __init__(
        self, longest_first: Sequence[tuple[int, int]], rows: int, most_tokens: int, pages: int
    ) -> None:
        self._waiting = deque(longest_first)
        self._left = sum(answer for _, answer in longest_first)
        self._rows, self._most_tokens, self._most_pages = rows, most_tokens, pages
        self._pages = float(pages)  # that are free
        self._entering: deque[list[float]] = deque()  # [tokens left, answer, mean pages]
        self._ends: list[tuple[int, float]] = []  # (visit after the last, mean pages)
        self._visit = 0
        self._are_alike = are_alike(answer for _, answer in longest_first)
        self._due = 1.0  # rows that are due to enter, where equal ones enter one by one
        self._is_steady = self._has_ended = False
        self._prefix_tokens = 0.0  # that a request brings beside its prompt
        # (is steady, kind) -> count, rows, tokens of prompts, answers' tokens
        self._sums: dict[tuple[bool, tuple[int, int]], list[float]] = {}

    def prefill_first(self, prefixes: Prefixes) -> None:
        """Process the prefixes that the first rows wait for; later ones come with the prompts."""
        total = prefixes.tokens * len(self._waiting)
        for _ in range(prefixes.visits):
            tokens = min(prefixes.first / prefixes.visits, self._most_tokens)
            self._note(1, 0, tokens, 0)
            self._visit += 1
            total -= tokens
        self._prefix_tokens = max(total, 0.0) / len(self._waiting)

    def play(self) -> None:
        """Play until every request has ended."""
        while self._waiting or self._entering or self._ends:
            self._enter()
            decoding = len(self._ends)
            prompt_tokens, started = self._prefill(self._most_tokens - decoding)
            count = 1 if prompt_tokens else self._until_next()
            self._note(count, decoding, prompt_tokens, started)
            self._visit += count
            self._due = min(self._due, 1.0) + count * (self._pace or 1.0)
            while self._ends and self._ends[0][0] <= self._visit:
                self._pages += heapq.heappop(self._ends)[1]
                self._has_ended = True

    def _until_next(self) -> int:
        """Visits until a row ends, or one is due to enter."""
        count, pace = self._ends[0][0] - self._visit, self._pace
        return count if pace is None else max(1, min(count, ceil((1 - self._due) / pace)))

    @property
    def _pace(self) -> float | None:
        """Rows that enter in a visit if they enter one by one, as layout/admission.py says."""
        if not self._waiting or not self._are_alike:
            return None
        usual = self._waiting[len(self._waiting) // 2]
        rows, pages, waiting = self._rows, self._most_pages, len(self._waiting)
        together = min(rows, pages / pages_of(sum(usual)))
        apart = min(rows, pages / (_mean_pages(usual) + 0.5))
        if waiting / together <= waiting / apart + 1:
            return None
        return PACE * apart / usual[1]

    def kinds(self, tokens: float) -> tuple[Visits, ...]:
        """All visits, those of the middle as often as answers of so many tokens take."""
        of_steady = sum(each[3] for (steady, _), each in self._sums.items() if steady)
        played = sum(each[3] for each in self._sums.values())
        factor = 1 + (tokens - played) / of_steady if of_steady else tokens / played
        kinds: dict[tuple[int, int], list[float]] = {}
        for (steady, kind), each in self._sums.items():
            times = factor if steady or not of_steady else 1.0
            sums = kinds.setdefault(kind, [0.0] * 3)
            for place in range(3):
                sums[place] += times * each[place]
        return tuple(
            Visits(count, decoding / count, prompts / count)
            for count, decoding, prompts in kinds.values()
        )

    def _enter(self) -> None:
        """Let waiting requests take free rows, as runtime/scheduler.py does."""
        free = self._rows - len(self._ends) - len(self._entering)
        while free and self._waiting:
            if self._pace is not None and self._due < 1 and free < self._rows:
                return
            longest, shortest = (_mean_pages(self._waiting[at]) for at in (0, -1))
            is_urgent = self._waiting[0][1] * self._rows >= self._left
            is_empty = free == self._rows
            fits = pages_of(sum(self._waiting[0])) <= self._pages
            has_share = is_urgent or longest + (free - 1) * shortest <= self._pages
            if is_empty or (fits and has_share):
                (prompt, answer), pages = self._waiting.popleft(), longest
            elif shortest <= self._pages:
                (prompt, answer), pages = self._waiting.pop(), shortest
            else:
                return
            self._entering.append([prompt + self._prefix_tokens, answer, pages])
            self._pages -= pages
            self._left -= answer
            self._due -= 1
            free -= 1

    def _prefill(self, room: float) -> tuple[float, int]:
        """Process prompts; returns their tokens, and how many are complete."""
        before, started = room, 0
        while room > 0 and self._entering:
            row = self._entering[0]
            count = min(room, row[0])
            row[0] -= count
            room -= count
            if not row[0]:
                self._entering.popleft()
                heapq.heappush(self._ends, (self._visit + int(row[1]), row[2]))
                started += 1
        return before - room, started

    def _note(self, count: int, decoding: int, prompt_tokens: float, started: int) -> None:
        is_steady = self._has_ended and bool(self._waiting)
        prompts = _step(prompt_tokens / self._most_tokens) if prompt_tokens else -1
        key = is_steady, (_step(decoding / self._rows), prompts)
        sums = self._sums.setdefault(key, [0.0] * 4)
        tokens = count * (decoding + started)
        for place, each in enumerate((count, count * decoding, count * prompt_tokens, tokens)):
            sums[place] += each


def _step(share: float) -> int:
    return (share >= FEW) + (share >= FULL)


def _mean_pages(length: tuple[int, int]) -> float:
    """Pages of a row at half of its answer."""
    return (pages_of(length[0]) + pages_of(sum(length))) / 2
