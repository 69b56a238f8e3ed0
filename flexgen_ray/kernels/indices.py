"""Transfer of small lists of indices to a device. Knows no tiers and no rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def place_indices(
    values: Sequence | np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Tensor of indices, or of numbers of another dtype, on a device; does not wait for it."""
    indices = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return indices.to(device, non_blocking=True)
