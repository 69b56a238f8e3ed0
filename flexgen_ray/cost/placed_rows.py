"""What becomes of each row of a pass in one layer, given how the layer's slots are divided.

The store moves and the cost model counts by the same answer. Knows rows; no tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from flexgen_ray.cost.placement import RowSplit
from flexgen_ray.rows import Row, Rows, runs

T = TypeVar("T")


@dataclass(frozen=True)
class PlacedRows:
    """Rows and the division of their slots; memo: what others derive from them, by name."""

    rows: Rows
    split: RowSplit
    spare: int
    memo: dict[str, Any] = field(default_factory=dict, compare=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
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
        return list(runs(self.attended))

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

    def choosing(self, most: int) -> list[tuple[int, list[Row]]]:
        """(first place in the streaming slot, rows) of the streamed rows that decode, neighbours
        together, `most` at a time."""
        first = self.split.gpu + self.split.attended
        decoding = (row for row, _ in self.streamed if not row.is_prefill)
        return self.once(
            f"choosing {most}", lambda: [(it[0].slot - first, it) for it in runs(decoding, most)]
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
