"""The composition of one pass of one batch: which slots bring how many new tokens.

Rows are ragged: a decoding row brings one token, a prefilling row a chunk. Linear layers see the
packed tokens, attention the rows. No tensors here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Row:
    """One slot's share of a pass.

    position: tokens already in its cache; offset: its first new token among the packed ones;
    is_sampled: whether its last new token is followed by one to be chosen; is_prefill: whether its
    new tokens were known when it took its slot, however few of them this pass brings. stale: tokens
    in its cache before its first pass, of an earlier request; those beyond its own are cleared.
    """

    slot: int
    position: int
    num_new_tokens: int
    offset: int
    is_sampled: bool
    is_prefill: bool
    stale: int = 0

    @property
    def tokens(self) -> slice:
        """Where its new tokens lie among the packed ones."""
        return slice(self.offset, self.offset + self.num_new_tokens)

    @property
    def seq_len(self) -> int:
        """Tokens in its cache after this pass."""
        return self.position + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """Tokens that follow a row's new ones and are known already, but how likely they are.

    first: the packed token that the first of them follows; top: likeliest tokens to be told beside.
    """

    slot: int
    first: int
    token_ids: tuple[int, ...]
    top: int


@dataclass(frozen=True)
class Rows:
    """All rows of a pass, in slot order, and their packed tokens; without these after stage 0."""

    rows: tuple[Row, ...]
    token_ids: tuple[int, ...]
    prefill_tokens: int = 0
    scored: tuple[ScoredRow, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.rows[-1].tokens.stop if self.rows else 0

    @cached_property
    def positions(self) -> list[int]:
        """Of each packed token in its sequence."""
        return [p for row in self.rows for p in range(row.position, row.seq_len)]

    @cached_property
    def sampled(self) -> list[Row]:
        return [row for row in self.rows if row.is_sampled]

    @cached_property
    def num_logits(self) -> int:
        """Tokens that the head sees; none if the pass has no outcome that is to be told."""
        return len(self.sampled) + sum(len(row.token_ids) for row in self.scored)


NO_ROWS = Rows((), ())


def runs(rows: Iterable[Row], most: int | None = None) -> Iterator[list[Row]]:
    """Runs of decoding rows in neighbouring slots, as long as can be, or `most` rows: each a slice
    of cache and tokens."""
    run: list[Row] = []
    for row in rows:
        if run and (
            len(run) == most or (row.slot, row.offset) != (run[-1].slot + 1, run[-1].offset + 1)
        ):
            yield run
            run = []
        run.append(row)
    if run:
        yield run
