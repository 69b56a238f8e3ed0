"""The three tiers of a stage: memory and disk space, allocated under budgets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexgen_ray.store.disk import DiskTier
from flexgen_ray.store.memory import MemoryTier

TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Tiers:
    """Tiers from which a stage's stores allocate their memory and disk space."""

    gpu: MemoryTier
    cpu: MemoryTier
    disk: DiskTier

    @property
    def device(self) -> torch.device:
        return self.gpu.device

    def used(self) -> dict[str, dict[str, int]]:
        """{tier: {buffer: bytes}} allocated so far."""
        return {tier.name: dict(tier.used) for tier in (self.gpu, self.cpu, self.disk)}
