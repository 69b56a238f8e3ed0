"""How far ahead ops are issued: little by little, they disturb the lanes less."""

from __future__ import annotations

VISITS_AHEAD = 1  # issued beyond the oldest that is not over
CELL_OPS = 16  # of a cell, at most; sparse attention may add three
CELLS_AHEAD = 4  # issued beyond a layer's, which its weights run ahead


def window_ops(num_batches: int) -> int:
    """Most ops of a stage that are issued and not over, for so many batches a block."""
    return CELL_OPS * (num_batches + CELLS_AHEAD)
