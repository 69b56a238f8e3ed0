"""Lengths of answers, learned from those that ended: how many more tokens one is expected to take.

Answers may end before max_tokens, and pages that are kept for tokens that never come are idle. The
estimate is that of Kaplan and Meier (1958), so that answers under way, and those that were cut at
max_tokens, count as long as they lasted: of the answers that had `t` tokens, the share that ended
there is the risk at `t`. With answers of 3 and 5 tokens that ended, one of 4 that was cut, and one
under way that has 9,

    tokens               3      5      beyond
    answers that had it  4      2
    ended there          1      1
    longer than that     3/4    3/8    3/8     as long as nothing else is known

and an answer that begins is expected to have 3 + 2 x 3/4 + 3/8 x (max_tokens - 5) tokens.
Knows lengths; no rows and no pages.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class AnswerLengths:
    """Lengths of the answers of a run."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all answers."""
        self._ended = np.zeros(16, int)  # answers that ended, by their tokens
        self._cut = np.zeros(16, int)
        self._longer = np.ones(1)  # share of the answers that have more tokens than so many
        self._area = np.arange(2.0)  # sum of these shares up to so many tokens
        self._has_news = False
        self.version = 0  # of the estimate

    @property
    def are_known(self) -> bool:
        """True if some answer has ended by itself."""
        return bool(self._ended.any())

    @property
    def reach_their_most(self) -> bool:
        """True if answers were cut at max_tokens, and none has ended by itself."""
        return bool(self._cut.any()) and not self.are_known

    def add(self, tokens: int, was_cut: bool) -> None:
        """Count an answer that is whole. was_cut: it has ended at max_tokens."""
        while tokens >= len(self._ended):
            self._ended, self._cut = (np.pad(it, (0, len(it))) for it in (self._ended, self._cut))
        (self._cut if was_cut else self._ended)[tokens] += 1
        self._has_news |= not was_cut

    def update(self, under_way: Iterable[int]) -> None:
        """Estimate anew if an answer has ended since; under_way: tokens of each that goes on."""
        if not self._has_news:
            return
        self._has_news = False
        self.version += 1
        size = len(self._ended)
        going_on = np.minimum(np.fromiter(under_way, int), size - 1)
        whole = self._ended + self._cut + np.bincount(going_on, minlength=size)
        had = whole[::-1].cumsum()[::-1]
        self._longer = np.cumprod(1 - self._ended / np.maximum(had, 1))
        self._area = np.concatenate(([0.0], self._longer.cumsum()))

    def expected(self, tokens: int, most: int) -> float:
        """Expected length of an answer that has so many tokens, and at most `most`."""
        last = len(self._longer) - 1
        share = self._longer[min(tokens, last)]
        if not share:  # longer than any that was seen
            return most
        area = self._area[min(most, last + 1)] - self._area[min(tokens, last + 1)]
        beyond = max(most - max(tokens, last + 1), 0) * self._longer[last]
        return tokens + (area + beyond) / share
