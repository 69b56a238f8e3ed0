"""Weights on three tiers, and the slots through which the streamed ones reach the device.

Follows cost/weight_layout.py. Knows names and bytes; not what a layer computes.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from flexgen_ray.cost.placement import stored_tensors
from flexgen_ray.cost.sizes import StagePlan, device_slot_bytes, staging_slot_bytes
from flexgen_ray.cost.weight_layout import Place
from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.schedule.ops import WEIGHTS_SLOTS, Op, staging_slots
from flexgen_ray.store.memory import page_aligned
from flexgen_ray.store.tier import Tiers

TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class WeightStore:
    """The weights of a stage."""

    def __init__(self, plan: StagePlan, checkpoint: Checkpoint, tiers: Tiers) -> None:
        self.plan = plan
        self.dtype = TORCH_DTYPE[plan.dtype]
        self._layout = plan.weights
        for layer in plan.stage.layers:
            checkpoint.check(layer, stored_tensors(plan.config, plan.stage, layer))
        self._parts = plan.policy.num_gpu_batches
        need = self._layout.nbytes
        self._memory = {
            "gpu": tiers.gpu.allocate("weights", need["gpu"]),
            "cpu": tiers.cpu.allocate("weights", need["cpu"]),
        }
        self._disk = tiers.disk.allocate("weights", need["disk"])
        slots = WEIGHTS_SLOTS, device_slot_bytes(plan)
        self._device_slots = tiers.gpu.allocate("weights in flight", prod(slots)).view(slots)
        staging = staging_slots(self._parts), staging_slot_bytes(plan)
        self._staging = tiers.cpu.allocate("weights in flight", prod(staging)).view(staging)
        self._views = {
            (layer, slot): self._view(layer, slot)
            for layer in plan.stage.with_weights
            for slot in range(WEIGHTS_SLOTS)
        }
        self._fill(checkpoint)

    def tensors(self, op: Op) -> dict[str, Tensor]:
        """The weights of the op's layer on the device, resident and streamed, by name."""
        return self._views[op.layer, op.weights_slot]

    def lookup(self, name: str, ids: Tensor | None) -> Tensor:
        """Rows of an embedding table (all if ids is None), in the memory where the table lies.

        From disk each distinct row is read once; ids must be a host tensor unless on the device.
        """
        place, shape = self._layout.places[0][name], self.plan.config.tensors(0)[name]
        if place.tier != "disk":
            table = self._typed(self._memory[place.tier], place.start, shape)
            return table if ids is None else torch.nn.functional.embedding(ids, table)
        region = self._disk.part(place.start, place.nbytes)
        if ids is None:
            table = torch.empty(shape, dtype=self.dtype)
            region.read_into(table)
            return table
        distinct, places = ids.unique(return_inverse=True)
        rows = torch.empty(len(distinct), shape[1], dtype=self.dtype)
        for row, index in zip(rows, distinct.tolist(), strict=True):
            region.read_into(row, index * shape[1] * self.dtype.itemsize)
        return rows[places]

    @property
    def embeds_on_device(self) -> bool:
        return all(place.tier == "gpu" for place in self._layout.places[0].values())

    def streams(self, layer: int, tier: str | None = None) -> bool:
        """Whether any of a layer's weights cross the link (from this tier)."""
        extents = self._layout.streams[layer].extents
        return any(tier in (None, extent.tier) for extent in extents)

    def read_part(self, op: Op) -> None:
        """READ_WEIGHTS: part `op.part` of the layer's bytes on disk, to its staging slot."""
        slot, filled = self._staging[op.staging_slot], 0
        for piece in self._layout.streams[op.layer].pieces("disk", op.part, self._parts):
            self._disk.read_into(slot[filled : filled + piece.nbytes], piece.start)
            filled += piece.nbytes

    def load_part(self, op: Op) -> None:
        """LOAD_WEIGHTS: part `op.part` of the layer's bytes in host memory, and what READ_WEIGHTS
        read of the same part, to its device slot."""
        target, stream = self._device_slots[op.weights_slot], self._layout.streams[op.layer]
        for piece in stream.pieces("cpu", op.part, self._parts):
            source = self._memory["cpu"][piece.start : piece.start + piece.nbytes]
            target[piece.target : piece.target + piece.nbytes].copy_(source, non_blocking=True)
        low, high = stream.span("disk", op.part, self._parts)
        target[low:high].copy_(self._staging[op.staging_slot, : high - low], non_blocking=True)

    def _view(self, layer: int, slot: int) -> dict[str, Tensor]:
        """A layer's weights by name, the streamed ones in a device slot."""
        views, shapes = {}, self.plan.config.tensors(layer)
        for name, place in self._layout.places[layer].items():
            if place.tier == "gpu":
                views[name] = self._typed(self._memory["gpu"], place.start, shapes[name])
            else:
                start = self._layout.streams[layer].target(place)
                views[name] = self._typed(self._device_slots[slot], start, shapes[name])
        return views

    def _fill(self, checkpoint: Checkpoint) -> None:
        for layer in self.plan.stage.layers:
            for name, shape in stored_tensors(self.plan.config, self.plan.stage, layer).items():
                place = self._layout.places[layer][name]
                self._fill_one(checkpoint, layer, name, shape, place)

    def _fill_one(
        self, checkpoint: Checkpoint, layer: int, name: str, shape: tuple[int, ...], place: Place
    ) -> None:
        if place.tier != "disk":
            target = self._typed(self._memory[place.tier], place.start, shape)
            checkpoint.read_into(layer, name, target)
        else:
            pages = page_aligned(place.nbytes)
            checkpoint.read_into(layer, name, self._typed(pages, 0, shape))
            self._disk.write(pages, place.start)

    def _typed(self, memory: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
        nbytes = prod(shape) * self.dtype.itemsize
        return memory[start : start + nbytes].view(self.dtype).view(shape)
