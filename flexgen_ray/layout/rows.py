"""The composition of one pass of one batch: which slots bring how many new tokens.

Rows are ragged: a decoding row brings one token, a prefilling row a chunk. Linear layers see the
packed tokens, attention the rows. No tensors here.

What becomes of each row of a pass in one layer, given how the layer's slots are divided.

The store moves and the cost model counts by the same answer. Knows rows; no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from flexgen_ray.layout.placement import RowSplit

T = TypeVar("T")


@dataclass(frozen=True)
class PlacedRows:
    """Rows and the division of their slots; memo: what others derive from them, by name."""

    rows: Rows
    split: RowSplit
    spare: int
    memo: dict[str, Any] = field(default_factory=dict, compare=False)

    def memoized(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned the first time, for every layer that treats these rows alike."""
        if name not in self.memo:
            self.memo[name] = make()
        return self.memo[name]

    @cached_property
    def resident(self) -> list[Row]:
        """Rows whose cache lives on the device."""
        return [row for row in self.rows.rows if row.slot < self.split.gpu]

    @cached_property
    def off_device(self) -> list[Row]:
        return [row for row in self.rows.rows if row.slot >= self.split.gpu]

    @cached_property
    def attended(self) -> list[Row]:
        """Decoding rows that are attended where their cache lies."""
        last = self.split.gpu + self.split.attended
        return [row for row in self.off_device if row.slot < last and not row.is_prefill]

    @cached_property
    def attended_runs(self) -> list[list[Row]]:
        return list(decoding_runs(self.attended))

    @cached_property
    def streamed(self) -> list[tuple[Row, int]]:
        """Rows attended on the device though their cache lives elsewhere, and their places in the
        streaming slot."""
        first = self.split.gpu + self.split.attended
        return [
            (row, row.slot - first if row.slot >= first else self.spare)
            for row in self.off_device
            if row.slot >= first or row.is_prefill
        ]

    @cached_property
    def streamed_end(self) -> int:
        """Tokens of the longest streamed row that decodes, with its new one."""
        return max((row.seq_len for row, _ in self.streamed if not row.is_prefill), default=0)

    def choosing_runs(self, most: int) -> list[tuple[int, list[Row]]]:
        """(first place in the streaming slot, rows) of the streamed rows that decode, neighbours
        together, `most` at a time."""
        first = self.split.gpu + self.split.attended
        decoding = (row for row, _ in self.streamed if not row.is_prefill)
        return self.memoized(
            f"choosing {most}",
            lambda: [(it[0].slot - first, it) for it in decoding_runs(decoding, most)],
        )

    @cached_property
    def in_memory(self) -> list[tuple[Row, int]]:
        """Rows whose cache lives in host memory, and their places there."""
        first, last = self.split.gpu, self.split.gpu + self.split.cpu
        return [(row, row.slot - first) for row in self.off_device if row.slot < last]

    @cached_property
    def on_disk(self) -> list[tuple[Row, int]]:
        """Rows whose cache lives on disk, and their places there."""
        first = self.split.gpu + self.split.cpu
        return [(row, row.slot - first) for row in self.off_device if row.slot >= first]

    @cached_property
    def first_off_device(self) -> int:
        """The first packed token of the rows off the device; theirs are the last."""
        return self.off_device[0].offset if self.off_device else self.rows.num_tokens

    @cached_property
    def streamed_copies(self) -> list[tuple[int, int, int, int, bool]]:
        """(first index in host memory, first place, rows, tokens, whether they prefill) of the
        caches to be streamed from host memory, neighbours together."""
        copies: list[tuple[int, int, int, int, bool]] = []
        for row, place in self.streamed:
            index = row.slot - self.split.gpu
            if index >= self.split.cpu or not row.position:
                continue
            if copies:
                first, at, count, tokens, prefills = copies[-1]
                if (index, place, row.is_prefill) == (first + count, at + count, prefills):
                    copies[-1] = first, at, count + 1, max(tokens, row.position), prefills
                    continue
            copies.append((index, place, 1, row.position, row.is_prefill))
        return copies


class Composition:
    """The rows of a pass, and how layers of each division treat them, derived once.

    spare: the streaming place of a host-attended row's prompt chunk.
    """

    def __init__(self, rows: Rows, spare: int) -> None:
        self.rows = rows
        self._spare = spare
        self._placed: dict[RowSplit, PlacedRows] = {}

    @property
    def drawn(self) -> float | None:
        """How many tokens are drawn of a whole vocabulary, if that is known (cost/between.py)."""
        return None

    def placed(self, split: RowSplit) -> PlacedRows:
        found = self._placed.get(split)
        if found is None:
            found = self._placed[split] = PlacedRows(self.rows, split, self._spare)
        return found


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


def decoding_runs(rows: Iterable[Row], most: int | None = None) -> Iterator[list[Row]]:
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
