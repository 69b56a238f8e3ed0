"""Random weights, generated at the speed of memory, to measure models without their checkpoints.

Values are small and deterministic, so that activations stay in range; answers are nonsense.
"""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

# Number of distinct random values. A prime, so that rows of a table differ though values repeat.
BLOCK = 2_097_143


class DummyWeights:
    """A source of weights: the same random numbers, repeated from another start in every tensor."""

    num_readers = 2  # one tensor is written to disk while another is filled

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._normal = torch.randn(BLOCK, generator=generator)
        self._scaled: dict[tuple[int, torch.dtype], Tensor] = {}

    def check(self, layer: int, tensors: dict[str, tuple[int, ...]], weight_format: object) -> None:
        """Accept any shapes."""

    def is_packed(self, layer: int, name: str) -> bool:
        """Return False: no weight is quantized already."""
        return False

    def read_into(self, layer: int, name: str, destination: Tensor) -> None:
        """Fill a weight: norms with one, biases with zero, matrices [out, in] with N(0, 1 / in)."""
        if destination.dim() == 1:
            destination.fill_(float(name.endswith(".weight")))
            return
        start = crc32(f"{layer}.{name}".encode()) % BLOCK
        block = self._block(destination.shape[-1], destination.dtype)[start : start + BLOCK]
        # For a weight on another device, copy the numbers there once and repeat them there.
        block = block.to(destination.device)
        flat = destination.view(-1)
        whole = flat.numel() // BLOCK * BLOCK
        flat[:whole].view(-1, BLOCK).copy_(block)
        flat[whole:].copy_(block[: flat.numel() - whole])

    def _block(self, fan_in: int, dtype: torch.dtype) -> Tensor:
        """Return the scaled numbers twice in a row, so that BLOCK of them can begin anywhere."""
        key = fan_in, dtype
        if key not in self._scaled:
            scaled = (self._normal * fan_in**-0.5).to(dtype)
            self._scaled[key] = torch.cat([scaled, scaled])
        return self._scaled[key]
