"""One pass of one batch: its rows, and what its ops derive from them, derived once.

Tensors here are made by the lane that uses them, and not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flexgen_ray.cost.placed_rows import Composition
from flexgen_ray.models.attention import length_mask
from flexgen_ray.rows import Row, Rows, runs
from flexgen_ray.store.kv_cache import place_indices


class Pass(Composition):
    """Rows of a pass, and the index tensors that their ops use."""

    def __init__(self, rows: Rows, spare: int, device: torch.device) -> None:
        super().__init__(rows, spare)
        self._device = device

    @cached_property
    def token_ids(self) -> Tensor:
        """[tokens] on the device; the following likewise."""
        return self._indices(list(self.rows.token_ids))

    @cached_property
    def positions(self) -> Tensor:
        return self._indices(self.rows.positions)

    @cached_property
    def last_tokens(self) -> Tensor:
        """[sampled rows] the packed token that each is to be followed after."""
        return self._indices([row.tokens.stop - 1 for row in self.rows.sampled])

    def _indices(self, values: list[int]) -> Tensor:
        return place_indices(values, self._device)


@dataclass(frozen=True)
class DecodeRun:
    """Decoding rows side by side, both in a cache from place `first` on and among packed tokens."""

    first: int
    count: int
    tokens: slice
    lens: list[int]
    mask: Tensor | None


def decode_runs(placed: list[tuple[Row, int]], device: torch.device) -> list[DecodeRun]:
    """Of rows and their places in a cache."""
    place = {row.slot: index for row, index in placed}
    found = []
    for run in runs(row for row, _ in placed if row.num_new_tokens == 1):
        tokens = slice(run[0].offset, run[0].offset + len(run))
        lens = [row.seq_len for row in run]
        mask = length_mask(lens, device)
        found.append(DecodeRun(place[run[0].slot], len(run), tokens, lens, mask))
    return found
