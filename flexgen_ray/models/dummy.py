"""Made-up weights at the speed of memory, for measurements of models that nobody downloads.

Values are small and deterministic, so that activations stay in range; the text is nonsense.
"""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

# A prime, so that the rows of a table differ though the values repeat.
BLOCK = 2_097_143


class DummyWeights:
    """One block of random numbers, repeated from a different start in every tensor."""

    num_readers = 2  # one is written to disk while the other is filled

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._normal = torch.randn(BLOCK, generator=generator)
        self._scaled: dict[tuple[int, torch.dtype], Tensor] = {}

    def check(self, layer: int, tensors: dict[str, tuple[int, ...]], weight_format: object) -> None:
        """Any shape will do."""

    def is_packed(self, layer: int, name: str) -> bool:
        return False

    def read_into(self, layer: int, name: str, destination: Tensor) -> None:
        """Norms are one, biases zero, matrices [out, in] normal with variance 1 / in."""
        if destination.dim() == 1:
            destination.fill_(float(name.endswith(".weight")))
            return
        start = crc32(f"{layer}.{name}".encode()) % BLOCK
        block = self._block(destination.shape[-1], destination.dtype)[start : start + BLOCK]
        # On its way to another device, what is repeated there crosses once.
        block = block.to(destination.device)
        flat = destination.view(-1)
        whole = flat.numel() // BLOCK * BLOCK
        flat[:whole].view(-1, BLOCK).copy_(block)
        flat[whole:].copy_(block[: flat.numel() - whole])

    def _block(self, fan_in: int, dtype: torch.dtype) -> Tensor:
        """The block twice, so that it can be taken from any start."""
        key = fan_in, dtype
        if key not in self._scaled:
            scaled = (self._normal * fan_in**-0.5).to(dtype)
            self._scaled[key] = torch.cat([scaled, scaled])
        return self._scaled[key]
