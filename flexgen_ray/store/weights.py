"""Weights on three tiers, and the slots through which the streamed ones reach the device.

Follows cost/weight_layout.py. Knows names and bytes; not what a layer computes.

Where packed weights are unpacked on the device: once a layer and pass, for all batches.

What PROJECT takes, what FINISH takes and the head have a workspace each, for the device projects
the next layer's first batch before it finishes this layer's last. Knows bytes; no maths.
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
from torch.nn.functional import embedding

from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.layout.placement import aligned, stored_tensors
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import staging_slot_bytes, unpacked_bytes, weights_slot_bytes
from flexgen_ray.layout.weights import Place
from flexgen_ray.quant.formats import PARTS, Shape, WeightFormat, part_of_op
from flexgen_ray.schedule.ops import LAYER_SLOTS, Op, staging_slots
from flexgen_ray.store.memory import MemoryTier, allocate_pages
from flexgen_ray.store.tiers import TORCH_DTYPE, Tiers


class Workspace:
    """Of one stage."""

    def __init__(self, plan: StagePlan, tier: MemoryTier) -> None:
        self._plan = plan
        self._dtype = TORCH_DTYPE[plan.dtype]
        sizes = unpacked_bytes(plan)
        memory = tier.allocate("weights unpacked", sum(sizes.values()))
        self._memory = dict(zip(PARTS, memory.split(list(sizes.values())), strict=True))
        self._layer: dict[str, int] = {}
        self._packed = {
            (layer, part): plan.weight_format.unpacked(plan.config.tensors(layer), part)
            for layer in plan.stage.with_weights
            for part in PARTS
        }

    def tensors(self, op: Op, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that an op takes, by name; stored: all of its layer on the device."""
        part = part_of_op(op.kind, op.layer == self._plan.config.head_layer)
        shapes = self._packed[op.layer, part]
        if not shapes:
            return stored
        views = self._views(part, shapes)
        if self._layer.get(part) != op.layer:
            for name, view in views.items():
                bits = self._plan.weight_format.bits_of(name, shapes[name])
                assert bits is not None
                unpack(stored[name], bits, view)
            self._layer[part] = op.layer
        return stored | views

    def _views(self, part: str, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        views, memory, start = {}, self._memory[part], 0
        for name, shape in shapes.items():
            nbytes = prod(shape) * self._plan.element_bytes
            views[name] = memory[start : start + nbytes].view(self._dtype).view(shape)
            start += aligned(nbytes)
        return views


OnProgress = Callable[[int, int], None]


class WeightSource(Protocol):
    """Where weights come from.

    num_readers: how many tensors may be read at a time.
    """

    @property
    def num_readers(self) -> int: ...

    def check(self, layer: int, tensors: dict[str, tuple[int, ...]], kept: WeightFormat) -> None:
        """ValueError if a tensor of the layer is missing, has another shape, or is packed already
        and not as it is to be kept."""

    def is_packed(self, layer: int, name: str) -> bool:
        """Whether a tensor is packed already."""

    def read_into(self, layer: int, name: str, destination: Tensor) -> None:
        """Copies one tensor, converting it to the destination's dtype unless it is packed."""


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
        self._kept = plan.weight_format
        for layer in plan.stage.layers:
            tensors = stored_tensors(plan.config, plan.stage, layer)
            source.check(layer, tensors, plan.weight_format)
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
        self._workspace = Workspace(plan, tiers.gpu)
        self._fill(source, on_progress)

    def tensors(self, op: Op) -> dict[str, Tensor]:
        """The weights that the op takes, resident, streamed and unpacked, by name; maybe more."""
        return self._workspace.tensors(op, self._views[op.layer, op.weights_slot])

    def lookup(self, name: str, ids: Tensor | None) -> Tensor:
        """Rows of an embedding table (all if ids is None), in the memory where the table lies.

        From disk each distinct row is read once; ids must be a host tensor unless on the device.
        """
        place, shape = self._layout.places[0][name], self.plan.config.tensors(0)[name]
        if place.tier != "disk":
            table = self._typed(self._memory[place.tier], place.start, name, shape)
            return self._plain(name, table if ids is None else embedding(ids, table))
        region = self._disk.part(place.start, place.nbytes)
        if ids is None:
            table = self._made(name, shape)
            region.read_into(table)
            return self._plain(name, table)
        distinct, places = ids.unique(return_inverse=True)
        rows = self._made(name, (len(distinct), shape[1]))
        for row, index in zip(rows, distinct.tolist(), strict=True):
            region.read_into(row, index * row.nbytes)
        return self._plain(name, rows)[places]

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
                views[name] = self._typed(self._memory["gpu"], place.start, name, shapes[name])
            else:
                start = self._layout.streams[layer].target(place)
                views[name] = self._typed(self._device_slots[slot], start, name, shapes[name])
        return views

    def _fill(self, source: WeightSource, on_progress: OnProgress | None) -> None:
        """What goes to disk, or is packed, takes host memory for the largest such weight of each
        reader."""
        plan, places = self.plan, self._layout.places
        weights = [
            _Weight(layer, name, shape, places[layer][name])
            for layer in plan.stage.layers
            for name, shape in stored_tensors(plan.config, plan.stage, layer).items()
        ]
        largest = max(map(self._fill_bytes, weights), default=0)
        buffers = [allocate_pages(largest) for _ in range(source.num_readers)]
        done, total = 0, sum(weight.place.nbytes for weight in weights)
        with ThreadPoolExecutor(source.num_readers) as readers:
            try:
                for nbytes in readers.map(partial(self._fill_one, source, buffers), weights):
                    done += nbytes
                    if on_progress:
                        on_progress(done, total)
            except BaseException:
                # Whoever stops it waits for one tensor, not for the rest of them.
                readers.shutdown(wait=False, cancel_futures=True)
                raise
        if self._memory["gpu"].is_cuda:
            # Whoever reads them does so on a stream of its own.
            torch.cuda.synchronize(self._memory["gpu"].device)

    def _fill_one(self, source: WeightSource, buffers: list[Tensor], weight: _Weight) -> int:
        """Its bytes; buffers: free host memory for weights that aren't read to where they lie."""
        name, shape, place = weight.name, weight.shape, weight.place
        buffer = buffers.pop()
        try:
            on_disk, bits = place.tier == "disk", self._kept.bits_of(name, shape)
            home = buffer if on_disk else self._memory[place.tier][place.start :]
            target = self._typed(home, 0, name, shape)
            if bits is None or source.is_packed(weight.layer, name):
                source.read_into(weight.layer, name, target)
            else:
                values = buffer[place.nbytes :][: prod(shape) * self.dtype.itemsize]
                values = values.view(self.dtype).view(shape)
                source.read_into(weight.layer, name, values)
                packed = self._typed(buffer, 0, name, shape)
                pack(values, bits, packed, least_squares=True)
                if not on_disk:
                    target.copy_(packed)
            if on_disk:
                self._disk.write(buffer[: place.nbytes], place.start)
        finally:
            buffers.append(buffer)
        return place.nbytes

    def _fill_bytes(self, weight: _Weight) -> int:
        """Of the memory that it takes on its way."""
        is_packed = self._kept.bits_of(weight.name, weight.shape) is not None
        own = weight.place.nbytes if is_packed or weight.place.tier == "disk" else 0
        return own + is_packed * prod(weight.shape) * self.dtype.itemsize

    def _plain(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a table, unpacked if they are packed."""
        shape = self.plan.config.tensors(0)[name]
        bits = self._kept.bits_of(name, shape)
        if bits is None:
            return rows
        values = torch.empty(*rows.shape[:-1], shape[-1], dtype=self.dtype, device=rows.device)
        unpack(rows, bits, values)
        return values

    def _made(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """New host memory for so many rows of a weight, as it is stored."""
        return self._typed(allocate_pages(self._kept.stored_bytes(name, shape)), 0, name, shape)

    def _typed(self, memory: Tensor, start: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """A weight as it is stored: uint8 where it is packed."""
        nbytes = self._kept.stored_bytes(name, shape)
        dtype = self.dtype if self._kept.bits_of(name, shape) is None else torch.uint8
        stored = memory[start : start + nbytes].view(dtype)
        return stored.view(self._kept.stored_shape(name, shape))
