"""Rows of one pass of one batch: which slots bring how many new tokens, and how layers treat them.

Rows are ragged: a decoding row brings one token, a prefilling row a chunk of its prompt. Linear
layers process the packed tokens of all rows, attention the rows. `PlacedRows` divides the rows of a
pass by where a layer keeps and attends their cache; the stores move data, and the cost model counts
bytes, by the same answer.

Knows slots and tokens; no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

from flexgen_ray.layout.placement import RowSplit

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """Part of a pass that belongs to one slot.

    position: tokens in the slot's cache before this pass; offset: index of its first new token
    among the packed tokens; is_sampled: True if a token is to be sampled after its last new one;
    is_prefill: True if its new tokens were known when the sequence took the slot, even if this pass
    brings only one of them; stale: tokens that an earlier request left in the slot's cache, set in
    the first pass only; those beyond the row's own tokens are cleared.
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
        """Slice of the row's new tokens among the packed tokens."""
        return slice(self.offset, self.offset + self.num_new_tokens)

    @property
    def seq_len(self) -> int:
        """Tokens in the slot's cache after this pass."""
        return self.position + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """Known tokens of a row whose log-probabilities are asked for, such as those of a prompt.

    first: index of the packed token that the first of them follows; top: number of likeliest tokens
    to report beside each.
    """

    slot: int
    first: int
    token_ids: tuple[int, ...]
    top: int


@dataclass(frozen=True)
class Rows:
    """All rows of a pass, in slot order, and their packed tokens.

    token_ids: empty in stages after the first, which receive hidden states.
    """

    rows: tuple[Row, ...]
    token_ids: tuple[int, ...]
    prefill_tokens: int = 0
    scored: tuple[ScoredRow, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.rows[-1].tokens.stop if self.rows else 0

    @cached_property
    def are_single(self) -> bool:
        """True if every row brings one token, as in decoding."""
        return self.num_tokens == len(self.rows)

    @cached_property
    def positions(self) -> list[int]:
        """Position of each packed token in its sequence."""
        return [p for row in self.rows for p in range(row.position, row.seq_len)]

    @cached_property
    def sampled(self) -> list[Row]:
        return [row for row in self.rows if row.is_sampled]

    @cached_property
    def num_logits(self) -> int:
        """Tokens that the head processes: those sampled or scored after; 0 if there are none."""
        return len(self.sampled) + sum(len(row.token_ids) for row in self.scored)


NO_ROWS = Rows((), ())


class MemoKey(Generic[T]):
    """Key of a result of type T that is derived from the rows of a pass, once for all layers."""


_CHOOSING_RUNS = MemoKey[list[tuple[int, list[Row]]]]()


class Composition:
    """The rows of a pass, and their division by each way in which a layer divides its slots.

    spare: place in the streaming slot for prompt chunks of rows that the host attends in decoding.
    """

    def __init__(self, rows: Rows, spare: int) -> None:
        self.rows = rows
        self._spare = spare
        self._placed: dict[RowSplit, PlacedRows] = {}

    @property
    def drawn(self) -> float | None:
        """Sum of the sampled tokens' `sampling_share` (cost/ops.py); None if it is not known."""
        return None

    def placed(self, split: RowSplit) -> PlacedRows:
        """The rows, divided; derived once for all layers with an equal division."""
        placed = self._placed.get(split)
        if placed is None:
            placed = self._placed[split] = PlacedRows(self.rows, split, self._spare)
        return placed


@dataclass(frozen=True)
class PlacedRows:
    """Rows of a pass by where one layer keeps and attends their cache.

    memo: results that stores derive from the rows, by key and variant (see `memoized`).
    """

    rows: Rows
    split: RowSplit
    spare: int
    memo: dict[tuple[MemoKey, Hashable], Any] = field(default_factory=dict, compare=False)

    def memoized(self, key: MemoKey[T], make: Callable[[], T], variant: Hashable = None) -> T:
        """The result of the first call of `make` for this key and variant, shared by all layers."""
        place = key, variant
        if place not in self.memo:
            self.memo[place] = make()
        return self.memo[place]

    @cached_property
    def resident(self) -> list[Row]:
        """Rows whose cache lies on the device."""
        return [row for row in self.rows.rows if row.slot < self.split.gpu]

    @cached_property
    def off_device(self) -> list[Row]:
        """Rows whose cache lies in host memory or on disk."""
        return [row for row in self.rows.rows if row.slot >= self.split.gpu]

    @cached_property
    def attended(self) -> list[Row]:
        """Decoding rows that the host attends, where their cache lies."""
        last = self.split.gpu + self.split.attended
        return [row for row in self.off_device if row.slot < last and not row.is_prefill]

    @cached_property
    def attended_runs(self) -> list[list[Row]]:
        return list(decoding_runs(self.attended))

    @cached_property
    def streamed(self) -> list[tuple[Row, int]]:
        """(row, place in the streaming slot) of rows off the device that the device attends."""
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
        """(first place in the streaming slot, rows) of runs of streamed rows that decode.

        Rows in neighbouring slots form a run, of at most `most` rows.
        """
        first = self.split.gpu + self.split.attended
        decoding = (row for row, _ in self.streamed if not row.is_prefill)
        return self.memoized(
            _CHOOSING_RUNS,
            lambda: [(run[0].slot - first, run) for run in decoding_runs(decoding, most)],
            most,
        )

    @cached_property
    def in_memory(self) -> list[tuple[Row, int]]:
        """(row, index) of rows whose cache lies in host memory."""
        first, last = self.split.gpu, self.split.gpu + self.split.cpu
        return [(row, row.slot - first) for row in self.off_device if row.slot < last]

    @cached_property
    def on_disk(self) -> list[tuple[Row, int]]:
        """(row, index) of rows whose cache lies on disk."""
        first = self.split.gpu + self.split.cpu
        return [(row, row.slot - first) for row in self.off_device if row.slot >= first]

    @cached_property
    def first_off_device(self) -> int:
        """Index of the first packed token of rows off the device, which come last."""
        return self.off_device[0].offset if self.off_device else self.rows.num_tokens

    @cached_property
    def streamed_copies(self) -> list[tuple[int, int, int, int, bool]]:
        """Copies that bring streamed rows' caches from host memory, neighbours in one copy.

        (index of the first row in host memory, its place in the streaming slot, number of rows,
        tokens to copy of each, whether they prefill).
        """
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


def decoding_runs(rows: Iterable[Row], most: int | None = None) -> Iterator[list[Row]]:
    """Yield runs of decoding rows in neighbouring slots, each a slice of cache and packed tokens.

    most: rows of a run at most; None for no limit.
    """
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
