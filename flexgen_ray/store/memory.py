"""Memory of the device and of the host, handed out under a budget.

Knows bytes and where they lie; not what they mean.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from flexgen_ray.store.ledger import Ledger

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def page_aligned(nbytes: int) -> Tensor:
    """A zeroed uint8 host tensor that starts at a page: a mapping of its own, which costs nothing
    until touched and is returned whole."""
    if not nbytes:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes, PRIVATE), dtype=torch.uint8)


class MemoryTier(Ledger):
    """Zeroed memory of a torch device; without CUDA the gpu tier is plain memory too."""

    def __init__(self, name: str, budget: int, device: torch.device) -> None:
        super().__init__(name, budget)
        self.device = device

    def allocate(self, what: str, nbytes: int) -> Tensor:
        """A zeroed uint8 tensor of exactly nbytes, page-aligned on the host."""
        self.book(what, nbytes)
        if self.device.type == "cpu":
            return page_aligned(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
