"""Rows on their way through a mixture's experts: those of the batches of one part, side by side.

A part's batches bring their rows one after the other (OUT), the experts take them all at once
(EXPERTS), and each batch gets its own back (COMBINE). All three run on one lane, in this order, so
one copy is enough.
"""

from __future__ import annotations

import torch

from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.experts import Routed
from flexgen_ray.store.tiers import TORCH_DTYPE, Tiers


class RoutedRows:
    """Buffer of routed_tokens rows, and which of them belong to which batch.

    If experts run in groups, their outputs are added up beside what they take.
    """

    def __init__(self, plan: StagePlan, tiers: Tiers) -> None:
        config, dtype, tokens = plan.config, TORCH_DTYPE[plan.dtype], plan.routed_tokens
        shapes = [
            ((tokens, config.hidden_size), dtype),
            ((tokens, config.experts_per_token), dtype),
            ((tokens, config.experts_per_token), torch.int64),
        ]
        if plan.mixtures.slots:
            shapes.append(shapes[0])
        x, shares, chosen, *sums = (
            tiers.gpu.allocate("rows for experts", torch.Size(shape).numel() * each.itemsize)
            .view(each)
            .view(shape)
            for shape, each in shapes
        )
        self._rows = Routed(x, shares, chosen)
        self._sums = sums[0] if sums else None
        self._step = plan.expert_tokens
        self._places: dict[int, slice] = {}
        self._filled = 0

    def has_room(self, count: int) -> bool:
        """True if so many rows more may enter."""
        return self._filled + count <= len(self._rows.x)

    def enter(self, batch: int, count: int) -> Routed:
        """Room for a batch's rows."""
        place = self._places[batch] = slice(self._filled, self._filled + count)
        self._filled = place.stop
        return self._rows.part(place)

    def tiles(self) -> list[tuple[Routed, torch.Tensor | None]]:
        """All rows that have entered, as many at a time as experts take, and their sums, if any."""
        ends = range(0, self._filled, self._step)
        tiles = [slice(at, min(at + self._step, self._filled)) for at in ends]
        sums = self._sums
        return [(self._rows.part(it), None if sums is None else sums[it]) for it in tiles]

    def leave(self, batch: int) -> torch.Tensor | None:
        """Outputs of the experts for a batch's rows, [tokens, hidden]; None if it has left."""
        place = self._places.pop(batch, None)
        if not self._places:
            self._filled = 0
        outputs = self._rows.x if self._sums is None else self._sums
        return None if place is None else outputs[place]

    @property
    def batches(self) -> list[int]:
        """Batches that have entered and not left."""
        return list(self._places)
