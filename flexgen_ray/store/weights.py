"""Weights on three tiers, and the slots through which the streamed ones reach the device.

Follows cost/weight_layout.py. Knows names and bytes; not what a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from flexgen_ray.cost.placement import stored_tensors
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.sizes import staging_slot_bytes, weights_slot_bytes
from flexgen_ray.cost.weight_layout import Place
from flexgen_ray.schedule.ops import LAYER_SLOTS, Op, staging_slots
from flexgen_ray.store.memory import page_aligned
from flexgen_ray.store.tier import Tiers

TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


OnProgress = Callable[[int, int], None]


class WeightSource(Protocol):
    """Where weights come from.

    num_readers: how many tensors may be read at a time.
    """

    @property
    def num_readers(self) -> int: ...

    def check(self, layer: int, tensors: dict[str, tuple[int, ...]]) -> None:
        """ValueError if a tensor of the layer is missing or has another shape."""

    def read_into(self, layer: int, name: str, destination: Tensor) -> None:
        """Copies one tensor, converting it to the destination's dtype."""


@dataclass(frozen=True)
class _Weight:
    """One that the stage stores."""

    layer: int
    name: str
    shape: tuple[int, ...]
    place: Place


class WeightStore:
    """The weights of a stage."""

    def __init__(
        self,
        plan: StagePlan,
        source: WeightSource,
        tiers: Tiers,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Takes the memory and fills it; on_progress(bytes done, bytes in all) as it does."""
        self.plan = plan
        self.dtype = TORCH_DTYPE[plan.dtype]
        self._layout = plan.weights
        for layer in plan.stage.layers:
            source.check(layer, stored_tensors(plan.config, plan.stage, layer))
        self._parts = plan.policy.num_gpu_batches
        need = self._layout.nbytes
        self._memory = {
            "gpu": tiers.gpu.allocate("weights", need["gpu"]),
            "cpu": tiers.cpu.allocate("weights", need["cpu"]),
        }
        self._disk = tiers.disk.allocate("weights", need["disk"])
        slots = weights_slot_bytes(plan)
        self._device_slots = tiers.gpu.allocate("weights in flight", sum(slots)).split(slots)
        staging = staging_slots(self._parts), staging_slot_bytes(plan)
        self._staging = tiers.cpu.allocate("weights in flight", prod(staging)).view(staging)
        self._views = {
            (layer, slot): self._view(layer, slot)
            for layer in plan.stage.with_weights
            for slot in {plan.stage.weights_slot(visit, layer) for visit in range(LAYER_SLOTS)}
        }
        self._fill(source, on_progress)

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
        return self._layout.embeds_on_device

    def read_part(self, op: Op) -> None:
        """READ_WEIGHTS: part `op.part` of the layer's bytes on disk, to its staging slot."""
        slot, filled = self._staging[op.staging_slot], 0
        for piece in self._layout.streams[op.layer].pieces("disk", op.part, self._parts):
            self._disk.read_into(slot[filled : filled + piece.nbytes], piece.start)
            filled += piece.nbytes

    def load_part(self, op: Op) -> None:
        """LOAD_WEIGHTS: part `op.part` of the layer's bytes in host memory, and what READ_WEIGHTS
        read of the same part, to its device slot; from disk itself if nothing is staged."""
        target, stream = self._device_slots[op.weights_slot], self._layout.streams[op.layer]
        for piece in stream.pieces("cpu", op.part, self._parts):
            source = self._memory["cpu"][piece.start : piece.start + piece.nbytes]
            target[piece.target : piece.target + piece.nbytes].copy_(source, non_blocking=True)
        if not self.plan.stages_disk:
            for piece in stream.pieces("disk", op.part, self._parts):
                into = target[piece.target : piece.target + piece.nbytes]
                self._disk.read_into(into, piece.start)
            return
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

    def _fill(self, source: WeightSource, on_progress: OnProgress | None) -> None:
        """What goes to disk takes host memory for the largest such weight of each reader."""
        plan, places = self.plan, self._layout.places
        weights = [
            _Weight(layer, name, shape, places[layer][name])
            for layer in plan.stage.layers
            for name, shape in stored_tensors(plan.config, plan.stage, layer).items()
        ]
        on_disk = (weight.place.nbytes for weight in weights if weight.place.tier == "disk")
        largest = max(on_disk, default=0)
        buffers = [page_aligned(largest) for _ in range(source.num_readers)]
        done, total = 0, sum(weight.place.nbytes for weight in weights)
        with ThreadPoolExecutor(source.num_readers) as readers:
            for nbytes in readers.map(partial(self._fill_one, source, buffers), weights):
                done += nbytes
                if on_progress:
                    on_progress(done, total)
        if self._memory["gpu"].is_cuda:
            # Whoever reads them does so on a stream of its own.
            torch.cuda.synchronize(self._memory["gpu"].device)

    def _fill_one(self, source: WeightSource, buffers: list[Tensor], weight: _Weight) -> int:
        """Its bytes; buffers: free host memory for weights on their way to disk."""
        place = weight.place
        if place.tier != "disk":
            target = self._typed(self._memory[place.tier], place.start, weight.shape)
            source.read_into(weight.layer, weight.name, target)
            return place.nbytes
        buffer = buffers.pop()
        try:
            source.read_into(weight.layer, weight.name, self._typed(buffer, 0, weight.shape))
            self._disk.write(buffer[: place.nbytes], place.start)
        finally:
            buffers.append(buffer)
        return place.nbytes

    def _typed(self, memory: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
        nbytes = prod(shape) * self.dtype.itemsize
        return memory[start : start + nbytes].view(self.dtype).view(shape)
