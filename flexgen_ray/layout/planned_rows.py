"""Rows of a plan's passes, which are all alike: where their caches lie, and what they share.

A plan knows lengths and amounts alone (`Sharing`), so prefixes are made up: rows that read 2,600
tokens of prefixes together, each of them 1,000, are three groups, of which two begin with the same
400 tokens. Knows plans; no pages and no tensors.
"""

from __future__ import annotations

from math import ceil

from flexgen_ray.config import PAGE_TOKENS
from flexgen_ray.layout.pages import Home, LayerKind, SharedHome
from flexgen_ray.layout.placement import RowSplit
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import Composition, Division, Rows


def shared_tokens(plan: StagePlan) -> int:
    """Tokens of prefixes that precede those of each row, in whole pages."""
    sharing = plan.workload.sharing
    if sharing is None or not plan.prefix_pages:
        return 0
    return max(1, round(sharing.mean_tokens / PAGE_TOKENS)) * PAGE_TOKENS


def compose(plan: StagePlan, rows: Rows) -> Composition:
    """The rows of a pass, divided as the plan's equal rows are."""
    return _Sharing(plan, rows) if shared_tokens(plan) else Composition(rows, plan.splits)


class _Sharing(Composition):
    """Rows that share prefixes."""

    def __init__(self, plan: StagePlan, rows: Rows) -> None:
        super().__init__(rows, plan.splits)
        # In a run few rows fold a prefix that lies on the tier of all of them. That isn't linear in
        # a plan's placement, so a plan counts every prefix as attended apart, unless attention is
        # sparse.
        self.folded_rows = plan.folded_rows if plan.is_sparse else 0
        self._tiers = plan.prefix_tiers
        self._groups = _find_groups(plan, len(rows.rows))

    def _divided(self, split: RowSplit, kind: LayerKind) -> list[Division]:
        chains = [
            tuple(SharedHome(number, first, last, self._home(last - first, kind))
                  for number, first, last in group)
            for group in self._groups
        ]  # fmt: skip
        divisions, count = super()._divided(split, kind), len(self.rows.rows)
        return [
            Division(each.tier, each.on_host, prefixes=chains[row * len(chains) // count])
            for row, each in enumerate(divisions)
        ]

    def _home(self, tokens: int, kind: LayerKind) -> Home:
        # Prefix keys that sparse rows have streamed aren't linear in it either: no page is counted.
        count = 0 if self.folded_rows else min(tokens // PAGE_TOKENS, kind.most_pages)
        pages = tuple(range(count))
        first, *others = self._tiers
        copy = Home(others[0], pages, most=kind.most_pages) if others else None
        return Home(first, pages, most=kind.most_pages, copy=copy)


def _find_groups(plan: StagePlan, rows: int) -> list[list[tuple[int, int, int]]]:
    """(number, first token, last token) of the prefixes of each group of so many rows."""
    sharing, each = plan.workload.sharing, shared_tokens(plan) // PAGE_TOKENS
    assert sharing is not None
    read = max(each, min(round(sharing.read_tokens(rows) / PAGE_TOKENS), rows * each))
    count, end = ceil(read / each), each * PAGE_TOKENS
    common = (count * each - read) * PAGE_TOKENS  # tokens of the last two groups
    alone = count - 2 if common else count
    groups = [[(1 + group, 0, end)] for group in range(alone)]
    groups += [[(0, 0, common), (1 + group, common, end)] for group in range(alone, count)]
    return groups
