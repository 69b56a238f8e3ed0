"""Prefixes that prompts share: whole pages of tokens with which several of them begin.

`find_prefixes` divides requests by their prompts, page by page. With pages of one letter, the
prompts abcd, abce, abfg, ab and xyz give a tree in which each prompt names its deepest prefix:

    ab        shared by four; abfg and ab have it themselves
      abc     shared by two: abcd and abce

A prefix holds only the pages that follow its parent's. At least one token of each prompt stays its
own, for logits follow a token that a pass brings. Knows tokens; no pools and no passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from statistics import fmean
from typing import NamedTuple

from flexgen_ray.config import PAGE_TOKENS, Sharing
from flexgen_ray.request import Request

MOST_LEVELS = 4  # prefixes of a prompt, one within the other; each takes products of its own
# A prefix that many rows attend takes products of its own in each pass in which they decode
# (layout/plan.FOLDED_ROWS). So it must save prompt tokens: LEAST_PAGES pages, and SAVED_PER_TOKEN
# tokens for each token of a usual answer, but no more than ENOUGH_TOKENS; from there on decoding
# gains, too, because it reads less.
LEAST_PAGES = 4
SAVED_PER_TOKEN, ENOUGH_TOKENS = 8, 1024


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens that several prompts share, after those of its parent.

    number: among the prefixes of a run, parents before children. start: tokens before it, those of
    its parents. token_ids: all tokens up to its end, those of the parents included. users: requests
    whose prompts begin with them.
    """

    number: int
    parent: Prefix | None
    start: int
    token_ids: tuple[int, ...] = field(repr=False)
    users: int

    @property
    def end(self) -> int:
        """Tokens up to its end, those of its parents included."""
        return len(self.token_ids)

    @property
    def tokens(self) -> int:
        """Number of its own tokens, a multiple of PAGE_TOKENS."""
        return self.end - self.start

    @property
    def pages(self) -> int:
        """Number of its own pages."""
        return self.tokens // PAGE_TOKENS

    @property
    def chain(self) -> tuple[Prefix, ...]:
        """Parents and the prefix itself, in the order of their tokens."""
        return (*(self.parent.chain if self.parent else ()), self)


@dataclass(frozen=True)
class SharedPrompts:
    """Prefixes of some requests.

    of_request: {index: deepest prefix} of the requests that share one. prefixes: all, parents
    first. possible_tokens: prompt tokens that need not be computed if every shared page is
    computed once.
    """

    of_request: dict[int, Prefix] = field(default_factory=dict)
    prefixes: tuple[Prefix, ...] = ()
    possible_tokens: int = 0

    def before(self, request: Request) -> int:
        """Tokens of a request's prompt that lie in prefixes."""
        prefix = self.of_request.get(request.index)
        return prefix.end if prefix else 0

    def own_lengths(self, requests: Iterable[Request]) -> list[tuple[int, int]]:
        """Tokens of each prompt without those in prefixes, and of the answer that is expected."""
        pairs = ((request, *request.expected_lengths) for request in requests)
        return [(prompt - self.before(request), answer) for request, prompt, answer in pairs]


NOTHING_SHARED = SharedPrompts()


class _Group(NamedTuple):
    """Requests whose prompts begin with the same pages, of which `start` are the parent's."""

    requests: list[Request]
    parent: Prefix | None
    start: int
    page: int
    level: int


def find_prefixes(
    requests: Iterable[Request], most_pages: int | None = None, first_number: int = 0
) -> SharedPrompts:
    """Prefixes that the prompts of these requests share.

    most_pages: pages of a prompt's prefixes together; None for any number. first_number: of the
    first prefix, from which on they are numbered.
    """
    of_request: dict[int, Prefix] = {}
    prefixes: list[Prefix] = []
    possible = 0
    groups = [_Group(list(requests), None, 0, 0, 0)]
    while groups:
        members, parent, start, page, level = groups.pop()
        if len(members) > 1:
            before, page = page, _common_pages(members, page, most_pages)
            possible += (page - before) * (len(members) - 1) * PAGE_TOKENS
        parts = _divide(members, page, most_pages)
        if len(members) > 1 and level < MOST_LEVELS and _is_worth(members, parts, page - start):
            tokens = tuple(members[0].prompt_token_ids[: page * PAGE_TOKENS])
            number = first_number + len(prefixes)
            parent = Prefix(number, parent, start * PAGE_TOKENS, tokens, len(members))
            prefixes.append(parent)
            start, level = page, level + 1
            of_request |= dict.fromkeys((request.index for request in members), parent)
        # The first part is taken up first, so that parts follow each other as they came.
        for part in reversed(parts):
            if len(part) > 1:
                possible += (len(part) - 1) * PAGE_TOKENS
                groups.append(_Group(part, parent, start, page + 1, level))
    return SharedPrompts(of_request, tuple(prefixes), possible)


def measure_sharing(answers: Sequence[Request], shared: SharedPrompts) -> Sharing | None:
    """Amount of what prompts share; None for nothing.

    answers: the requests, each as often as it has answers.
    """
    deepest = [shared.of_request[it.index] for it in answers if it.index in shared.of_request]
    if not deepest:
        return None
    return Sharing(
        len(answers),
        sum(prefix.tokens for prefix in shared.prefixes),
        max(prefix.end for prefix in deepest),
        sum(prefix.end for prefix in deepest) / len(answers),
        sum(len(prefix.chain) for prefix in deepest) / len(answers),
    )


def shareable_tokens(request: Request) -> int:
    """Tokens at the beginning of a prompt that others may have computed, in whole pages.

    The last token of the prompt is its own, and so is each that a scored token follows.
    """
    tokens = len(request.prompt_token_ids)
    if request.scored_from is not None:
        tokens = min(tokens, request.scored_from)
    return max(tokens - 1, 0) // PAGE_TOKENS * PAGE_TOKENS


def rank_groups(
    requests: Sequence[Request], prefix_of: Callable[[Request], Prefix | None]
) -> dict[int, int]:
    """{index: rank} of requests, by which those that share prefixes follow each other.

    Groups with the longest requests come first, and those that share parents stand together.
    Requests without a prefix are a group of their own.
    """
    deepest = {request.index: prefix_of(request) for request in requests}
    longest: dict[int, int] = {}
    for request in requests:
        prefix = deepest[request.index]
        for number in [it.number for it in prefix.chain] if prefix else [-1]:
            longest[number] = max(longest.get(number, 0), request.max_seq_len)

    def key(prefix: Prefix | None) -> tuple[tuple[int, int], ...]:
        numbers = [it.number for it in prefix.chain] if prefix else [-1]
        return tuple((-longest[number], number) for number in numbers)

    groups = sorted(set(deepest.values()), key=key)
    ranks = {prefix: rank for rank, prefix in enumerate(groups)}
    return {index: ranks[prefix] for index, prefix in deepest.items()}


def _common_pages(requests: Sequence[Request], page: int, most_pages: int | None) -> int:
    """Pages with which all of these prompts begin, which are known to be `page` or more."""
    last = min(map(shareable_tokens, requests)) // PAGE_TOKENS
    last = last if most_pages is None else min(last, most_pages)
    first = requests[0].prompt_token_ids
    for request in requests[1:]:
        tokens, low = request.prompt_token_ids, page
        while low < last and _span(first, low, last) != _span(tokens, low, last):
            middle = (low + last) // 2
            if _span(first, low, middle) == _span(tokens, low, middle):
                low = middle
                if low + 1 == last:
                    last = low
            else:
                last = middle
    return max(page, last)


def _span(tokens: list[int], first: int, last: int) -> list[int]:
    """Tokens of pages `first` to before `last`."""
    return tokens[first * PAGE_TOKENS : last * PAGE_TOKENS]


def _is_worth(requests: Sequence[Request], parts: Sequence[Sequence[Request]], pages: int) -> bool:
    """True if requests that have so many pages in common get a prefix of these.

    parts: those that have the next page in common, too. Without the prefix each request would have
    the pages once more; but parts that are large enough get prefixes of their own.
    """
    least = _least_saved(requests)
    alone = len(requests) - sum(map(len, parts))
    copies = alone + sum(
        1 if (pages + 1) * (len(part) - 1) >= least else len(part) for part in parts
    )
    return pages * (copies - 1) >= least


def _least_saved(requests: Sequence[Request]) -> int:
    """Pages that a prefix of these requests must save."""
    answer = fmean(request.expected_tokens for request in requests)
    return max(LEAST_PAGES, ceil(min(SAVED_PER_TOKEN * answer, ENOUGH_TOKENS) / PAGE_TOKENS))


def _divide(requests: Sequence[Request], page: int, most_pages: int | None) -> list[list[Request]]:
    """Parts of the requests that have the same tokens in a page; without those that end before."""
    if most_pages is not None and page >= most_pages:
        return []
    first, last = page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS
    parts: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        if shareable_tokens(request) >= last:
            parts.setdefault(tuple(request.prompt_token_ids[first:last]), []).append(request)
    return list(parts.values())
