"""Weights on three tiers, and the slots through which the streamed ones reach the device.

Each layer's streamed weights cross in one flat layout: first those that live in host memory, then
those that live on disk. Knows names and bytes; not what a layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from flexgen_ray.cost.placement import stored_tensors, tensor_bytes
from flexgen_ray.cost.sizes import StagePlan, stage_bytes, weight_bytes
from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.schedule.ops import NUM_SLOTS, Op
from flexgen_ray.store.tier import Region, Tiers

TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Home:
    """Where one tensor lies: a flat uint8 tensor in memory, or a region on disk."""

    tier: str
    place: Tensor | Region
    shape: tuple[int, ...]
    nbytes: int


class WeightStore:
    """The weights of a stage."""

    def __init__(self, plan: StagePlan, checkpoint: Checkpoint, tiers: Tiers) -> None:
        self.plan = plan
        self.dtype = TORCH_DTYPE[plan.dtype]
        for layer in plan.stage.layers:
            checkpoint.check(layer, stored_tensors(plan.config, plan.stage, layer))
        self._homes = self._allocate_homes(tiers)
        sizes = stage_bytes(plan)
        self._device_slots = _slots(tiers.gpu.allocate, sizes["gpu"]["weights in flight"])
        self._host_slots = _slots(tiers.cpu.allocate, sizes["cpu"]["weights in flight"])
        self._streams = {layer: self._stream(layer) for layer in plan.stage.with_weights}
        self._views = {
            (layer, slot): self._view(layer, slot)
            for layer in plan.stage.with_weights
            for slot in range(NUM_SLOTS)
        }
        self._fill(checkpoint)

    def tensors(self, op: Op) -> dict[str, Tensor]:
        """The weights of the op's layer on the device, resident and streamed, by name."""
        return self._views[op.layer, op.weights_slot]

    def lookup(self, name: str, ids: Tensor | None) -> Tensor:
        """Rows of an embedding table (all if ids is None), in the memory where the table lies.

        From disk each distinct row is read once; ids must be a host tensor unless on the device.
        """
        home = self._homes[0][name]
        if isinstance(home.place, Tensor):
            table = _typed(home.place, self.dtype, home.shape)
            return table if ids is None else torch.nn.functional.embedding(ids, table)
        width = home.shape[1] * self.dtype.itemsize
        wanted = torch.arange(home.shape[0]) if ids is None else ids
        distinct, places = wanted.unique(return_inverse=True)
        rows = torch.empty(len(distinct), home.shape[1], dtype=self.dtype)
        for row, index in zip(rows, distinct.tolist(), strict=True):
            home.place.read_into(row, index * width)
        return rows[places]

    @property
    def embeds_on_device(self) -> bool:
        return all(home.tier == "gpu" for home in self._homes[0].values())

    def streams(self, layer: int, tier: str | None = None) -> bool:
        """Whether any of a layer's weights cross the link (from this tier)."""
        return any(tier in (None, home.tier) for home in self._streams[layer].values())

    def load_part(self, op: Op) -> None:
        """LOAD_WEIGHTS: part `op.part` of the layer's streamed bytes, to its device slot."""
        target = self._device_slots[op.weights_slot]
        host = self._host_slots[op.weights_slot]
        for home, start, stop, first in self._pieces(op, None):
            if isinstance(home.place, Tensor):
                source = home.place[first : first + stop - start]
            else:
                source = host[start - self._disk_start(op.layer) :][: stop - start]
            target[start:stop].copy_(source, non_blocking=True)

    def read_part(self, op: Op) -> None:
        """READ_WEIGHTS: part `op.part` of the layer's bytes on disk, to its host slot."""
        host = self._host_slots[op.weights_slot]
        for home, start, stop, first in self._pieces(op, "disk"):
            assert isinstance(home.place, Region)
            offset = start - self._disk_start(op.layer)
            home.place.read_into(host[offset : offset + stop - start], first)

    def _pieces(self, op: Op, tier: str | None) -> Iterator[tuple[_Home, int, int, int]]:
        """(home, start, stop, first): bytes start..stop of the layout are at `first` of home."""
        spans, position = [], 0
        for home in self._streams[op.layer].values():
            spans.append((home, position))
            position += home.nbytes
        begin = self._disk_start(op.layer) if tier == "disk" else 0
        parts = self.plan.policy.num_gpu_batches
        low = begin + (position - begin) * op.part // parts
        high = begin + (position - begin) * (op.part + 1) // parts
        for home, offset in spans:
            start, stop = max(low, offset), min(high, offset + home.nbytes)
            if start < stop and tier in (None, home.tier):
                yield home, start, stop, start - offset

    def _disk_start(self, layer: int) -> int:
        return sum(h.nbytes for h in self._streams[layer].values() if h.tier == "cpu")

    def _allocate_homes(self, tiers: Tiers) -> dict[int, dict[str, _Home]]:
        plan, need = self.plan, weight_bytes(self.plan)
        pools: dict[str, Tensor | Region] = {
            "gpu": tiers.gpu.allocate("weights", need["gpu"]),
            "cpu": tiers.cpu.allocate("weights", need["cpu"]),
            "disk": tiers.disk.allocate("weights", need["disk"]),
        }
        used = dict.fromkeys(pools, 0)
        homes: dict[int, dict[str, _Home]] = {}
        for layer, placed in plan.weight_tiers().items():
            shapes = stored_tensors(plan.config, plan.stage, layer)
            homes[layer] = {}
            for name, tier in placed.items():
                pool, start = pools[tier], used[tier]
                nbytes = tensor_bytes(shapes[name], plan.dtype)
                place = (
                    pool[start : start + nbytes]
                    if isinstance(pool, Tensor)
                    else pool.part(start, nbytes)
                )
                homes[layer][name] = _Home(tier, place, shapes[name], nbytes)
                used[tier] += nbytes
        return homes

    def _homes_of(self, layer: int) -> dict[str, _Home]:
        """Of all tensors a layer uses; a tied head's table lives with the embedding."""
        own = self._homes[layer]
        return {
            name: own.get(name) or self._homes[0][name] for name in self.plan.config.tensors(layer)
        }

    def _stream(self, layer: int) -> dict[str, _Home]:
        homes = self._homes_of(layer)
        in_memory = {name: home for name, home in homes.items() if home.tier == "cpu"}
        return in_memory | {name: home for name, home in homes.items() if home.tier == "disk"}

    def _view(self, layer: int, slot: int) -> dict[str, Tensor]:
        views, position = {}, 0
        for name, home in self._homes_of(layer).items():
            if home.tier == "gpu":
                assert isinstance(home.place, Tensor)
                views[name] = _typed(home.place, self.dtype, home.shape)
        for name, home in self._streams[layer].items():
            place = self._device_slots[slot][position : position + home.nbytes]
            views[name] = _typed(place, self.dtype, home.shape)
            position += home.nbytes
        return views

    def _fill(self, checkpoint: Checkpoint) -> None:
        for layer, homes in self._homes.items():
            for name, home in homes.items():
                if isinstance(home.place, Tensor):
                    target = _typed(home.place, self.dtype, home.shape)
                    checkpoint.read_into(layer, name, target)
                else:
                    tensor = torch.empty(home.shape, dtype=self.dtype)
                    checkpoint.read_into(layer, name, tensor)
                    home.place.write(tensor)


def _typed(flat: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return flat[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _slots(allocate, nbytes: int) -> list[Tensor]:
    memory = allocate("weights in flight", nbytes)
    return list(memory.view(NUM_SLOTS, nbytes // NUM_SLOTS))
