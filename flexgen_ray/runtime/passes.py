"""One pass of one batch: its rows, and what its ops derive from them, derived once.

Tensors here are made by the lane that uses them, and not before.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from flexgen_ray.cost.placed_rows import PlacedRows
from flexgen_ray.cost.placement import RowSplit
from flexgen_ray.rows import Rows
from flexgen_ray.store.kv_cache import place_indices


class Pass:
    """Rows of a pass, on their way through the layers."""

    def __init__(self, rows: Rows, spare: int, device: torch.device) -> None:
        self.rows = rows
        self._spare = spare
        self._device = device
        self._placed: dict[RowSplit, PlacedRows] = {}

    def placed(self, split: RowSplit) -> PlacedRows:
        """The rows as this division of the slots treats them; most layers share a division."""
        found = self._placed.get(split)
        if found is None:
            found = self._placed[split] = PlacedRows(self.rows, split, self._spare)
        return found

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
        return place_indices([values], self._device)[:, 0]
