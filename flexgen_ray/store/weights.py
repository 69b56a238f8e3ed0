"""Weights of a stage on three tiers, and the slots through which streamed ones reach the device.

The layout (layout/weights.py) says where each weight lies. A layer's weights off the device cross
the link in parts: READ_WEIGHTS reads a part's bytes on disk into a staging slot in host memory, and
LOAD_WEIGHTS copies the part, from host memory and from the staging slot, to a device slot. Experts
may stream apart from these, in groups: READ_EXPERTS and LOAD_EXPERTS bring one group each, through
slots of their own. Quantized weights cross as they are, and are dequantized on the device once per
layer, or group, and visit, for all batches of the block.

Knows names and bytes; not what a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from math import gcd, prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from flexgen_ray.kernels.dequantize import dequantize
from flexgen_ray.kernels.pack import pack
from flexgen_ray.layout.placement import SECTOR, SINKS, aligned, stored_tensors
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import (
    dequantized_bytes,
    expert_slot_bytes,
    quantized_shapes,
    sinks_bytes,
    staged_group_bytes,
    staging_slot_bytes,
    weights_slot_bytes,
)
from flexgen_ray.layout.weights import Place
from flexgen_ray.quant.formats import PARTS, WeightFormat, part_of_op
from flexgen_ray.quant.frame import Shape
from flexgen_ray.quant.packing import PackedRows
from flexgen_ray.schedule.ops import (
    EXPERT_STAGING_SLOTS,
    LAYER_SLOTS,
    Op,
    OpKind,
    staging_slots,
)
from flexgen_ray.store.link import copy_across
from flexgen_ray.store.memory import MemoryTier, allocate_mapping
from flexgen_ray.store.tiers import TORCH_DTYPE, Tiers

EXPERTS_BYTES = 16 * 2**20  # about as many bytes of experts are loaded at a time
OnProgress = Callable[[int, int], None]


class WeightSource(Protocol):
    """A source of a model's weights, such as a checkpoint."""

    @property
    def num_readers(self) -> int:
        """Tensors that may be read at a time."""

    def check(
        self, layer: int, tensors: dict[str, tuple[int, ...]], weight_format: WeightFormat
    ) -> None:
        """Raise ValueError if a tensor is missing, has another shape, or is quantized otherwise."""

    def is_packed(self, layer: int, name: str) -> bool:
        """True if a tensor is quantized in the source."""

    def read_into(self, layer: int, name: str, destination: Tensor, first: int = 0) -> None:
        """Copy one tensor, converted to the destination's dtype unless it is quantized.

        first: number of the first expert, if the destination has some experts of a stacked tensor.
        """


class Sinks(NamedTuple):
    """Sinks of a layer's heads, float32 [heads], in two copies."""

    on_device: Tensor
    on_host: Tensor


@dataclass(frozen=True)
class _Weight:
    """A weight that the stage stores, or some experts of a stacked one, the first by its number."""

    layer: int
    name: str
    shape: tuple[int, ...]
    place: Place
    first: int = 0


class WeightStore:
    """Weights of a stage, stored by its plan.

    sinks: by decoder layer; {} for a model without.
    """

    def __init__(
        self,
        plan: StagePlan,
        source: WeightSource,
        tiers: Tiers,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Allocate memory and load all weights into it.

        on_progress: called with (bytes loaded, bytes in all) after each weight.
        """
        self.plan = plan
        self.dtype = TORCH_DTYPE[plan.dtype]
        self._layout = plan.weights
        self._format = plan.weight_format
        for layer in plan.stage.layers:
            tensors = stored_tensors(plan.config, plan.stage, layer)
            if layer in plan.stage.decoders and plan.config.attention_sinks:
                tensors |= {SINKS: plan.config.tensors(layer)[SINKS]}
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
        groups = plan.mixtures.slots, expert_slot_bytes(plan)
        self._expert_slots = tiers.gpu.allocate("weights in flight", prod(groups)).view(groups)
        staging = EXPERT_STAGING_SLOTS, staged_group_bytes(plan)
        self._expert_staging = tiers.cpu.allocate("weights in flight", prod(staging)).view(staging)
        self._workspace = DequantizeWorkspace(plan, tiers.gpu)
        self.sinks = _read_sinks(plan, source, tiers)
        self._fill(source, on_progress)

    def tensors(self, op: Op) -> dict[str, Tensor]:
        """{name: weights} for an op on the device, dequantized; possibly with more of its layer."""
        stored = self._views[op.layer, op.weights_slot]
        if op.kind is OpKind.EXPERTS and op.layer in self._layout.groups:
            stored = self._group_view(op, stored)
        return self._workspace.tensors(op, stored)

    def lookup(self, name: str, ids: Tensor | None) -> Tensor:
        """Look up rows of an embedding table, in the memory where the table lies.

        ids: None for the whole table; a host tensor, unless the table lies on the device. From disk
        each distinct row is read once.
        """
        place, shape = self._layout.places[0][name], self.plan.config.tensors(0)[name]
        if place.tier != "disk":
            table = self._stored_view(self._memory[place.tier], place.start, name, shape)
            return self._dequantized(name, table if ids is None else embedding(ids, table))
        region = self._disk.part(place.start, place.nbytes)
        if ids is None:
            table = self._allocate_rows(name, shape)
            region.read_into(table)
            return self._dequantized(name, table)
        distinct, places = ids.unique(return_inverse=True)
        rows = self._allocate_rows(name, (len(distinct), shape[1]))
        for row, index in zip(rows, distinct.tolist(), strict=True):
            region.read_into(row, index * row.nbytes)
        return self._dequantized(name, rows)[places]

    @property
    def embeds_on_device(self) -> bool:
        """True if embeddings are looked up on the device."""
        return self._layout.embeds_on_device

    def read_part(self, op: Op) -> None:
        """READ_WEIGHTS: read part `op.part` of the layer's bytes on disk into a staging slot."""
        slot, filled = self._staging[op.staging_slot], 0
        for piece in self._layout.streams[op.layer].pieces("disk", op.part, self._parts):
            self._disk.read_into(slot[filled : filled + piece.nbytes], piece.start)
            filled += piece.nbytes

    def load_part(self, op: Op) -> None:
        """LOAD_WEIGHTS: copy part `op.part` of the layer's streamed bytes to its device slot.

        Bytes on disk come from the staging slot into which READ_WEIGHTS read them, or from disk
        directly if the plan stages nothing.
        """
        target, stream = self._device_slots[op.weights_slot], self._layout.streams[op.layer]
        for piece in stream.pieces("cpu", op.part, self._parts):
            source = self._memory["cpu"][piece.start : piece.start + piece.nbytes]
            copy_across(target[piece.target : piece.target + piece.nbytes], source)
        if not self.plan.stages_disk:
            for piece in stream.pieces("disk", op.part, self._parts):
                into = target[piece.target : piece.target + piece.nbytes]
                self._disk.read_into(into, piece.start)
            return
        low, high = stream.span("disk", op.part, self._parts)
        copy_across(target[low:high], self._staging[op.staging_slot, : high - low])

    def read_experts(self, op: Op) -> None:
        """READ_EXPERTS: read a group of experts from disk into a staging slot."""
        (piece,) = self._layout.groups[op.layer][op.group].stream.pieces("disk", 0, 1)
        staging = self._expert_staging[op.staging_slot]
        self._disk.read_into(staging[: piece.nbytes], piece.start)

    def load_experts(self, op: Op) -> None:
        """LOAD_EXPERTS: copy a group of experts to its device slot, as `load_part` does."""
        group = self._layout.groups[op.layer][op.group]
        (piece,) = group.stream.pieces(group.tier, 0, 1)
        target = self._expert_slots[op.expert_slot, : piece.nbytes]
        if group.tier == "cpu":
            source = self._memory["cpu"][piece.start : piece.start + piece.nbytes]
            copy_across(target, source)
        elif self.plan.stages_disk:
            copy_across(target, self._expert_staging[op.staging_slot, : piece.nbytes])
        else:
            self._disk.read_into(target, piece.start)

    def _group_view(self, op: Op, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: weight} of a group of experts on the device; stored: the others of its layer."""
        group = self._layout.groups[op.layer][op.group]
        if group.tier == "gpu":
            return {key: stored[key] for key in group.keys}
        views, shapes = {}, self._layout.shapes(op.layer)
        for key in group.keys:
            start = group.stream.target(self._layout.places[op.layer][key])
            slot = self._expert_slots[op.expert_slot]
            views[key] = self._stored_view(slot, start, key, shapes[key])
        return views

    def _view(self, layer: int, slot: int) -> dict[str, Tensor]:
        """{name: weight} of a layer on the device, the streamed ones in a device slot."""
        views, shapes = {}, self._layout.shapes(layer)
        groups = self._layout.groups.get(layer, ())
        apart = {key for group in groups if group.tier != "gpu" for key in group.keys}
        for name, place in self._layout.places[layer].items():
            if name in apart:
                continue
            if place.tier == "gpu":
                views[name] = self._stored_view(
                    self._memory["gpu"], place.start, name, shapes[name]
                )
            else:
                start = self._layout.streams[layer].target(place)
                views[name] = self._stored_view(self._device_slots[slot], start, name, shapes[name])
        return views

    def _fill(self, source: WeightSource, on_progress: OnProgress | None) -> None:
        """Load all weights, several at a time.

        Each reader has a buffer in host memory for the largest weight that goes to disk, or is
        quantized on the way.
        """
        weights = list(self._weights())
        largest = max(map(self._fill_bytes, weights), default=0)
        buffers = [allocate_mapping(largest) for _ in range(source.num_readers)]
        done, total = 0, sum(weight.place.nbytes for weight in weights)
        with ThreadPoolExecutor(source.num_readers) as readers:
            try:
                for nbytes in readers.map(partial(self._fill_one, source, buffers), weights):
                    done += nbytes
                    if on_progress:
                        on_progress(done, total)
            except BaseException:
                # An interrupt waits for the tensors being read, not for all others.
                readers.shutdown(wait=False, cancel_futures=True)
                raise
        if self._memory["gpu"].is_cuda:
            # Other streams will read the weights.
            torch.cuda.synchronize(self._memory["gpu"].device)

    def _weights(self) -> Iterator[_Weight]:
        """Yield what is loaded at a time: a weight, or a few experts of a stacked one.

        On disk they are as many as fill whole sectors.
        """
        for layer in self.plan.stage.layers:
            stored = stored_tensors(self.plan.config, self.plan.stage, layer)
            for key, cut in self._layout.cuts[layer].items():
                place = self._layout.places[layer][key]
                if cut.name not in stored:
                    continue
                if cut.first is None:
                    yield _Weight(layer, cut.name, cut.shape, place)
                    continue
                count, *shape = cut.shape
                each = self._format.stored_bytes(cut.name, cut.shape) // count
                step = SECTOR // gcd(SECTOR, each) if place.tier == "disk" else 1
                step *= max(1, EXPERTS_BYTES // (step * prod(shape) * self.dtype.itemsize))
                for at in range(0, count, step):
                    some = min(step, count - at)
                    stop = place.nbytes if at + some == count else (at + some) * each
                    part = Place(place.tier, place.start + at * each, stop - at * each)
                    yield _Weight(layer, cut.name, (some, *shape), part, cut.first + at)

    def _fill_one(self, source: WeightSource, buffers: list[Tensor], weight: _Weight) -> int:
        """Load one weight, quantized if it is to be; returns its bytes.

        buffers: free host memory for weights that are not read directly into their place.
        """
        name, shape, place = weight.name, weight.shape, weight.place
        of_source = weight.layer, name
        buffer = buffers.pop()
        try:
            on_disk, form = place.tier == "disk", self._format.format_of(name, shape)
            home = buffer if on_disk else self._memory[place.tier][place.start :]
            target = self._stored_view(home, 0, name, shape)
            if form is None or source.is_packed(*of_source):
                source.read_into(*of_source, target, weight.first)
            else:
                values = buffer[place.nbytes :][: prod(shape) * self.dtype.itemsize]
                values = values.view(self.dtype).view(shape)
                source.read_into(*of_source, values, weight.first)
                packed = self._stored_view(buffer, 0, name, shape)
                assert isinstance(form, PackedRows)
                pack(values, form.bits, packed, least_squares=True)
                if not on_disk:
                    target.copy_(packed)
            if on_disk:
                self._disk.write(buffer[: place.nbytes], place.start)
        finally:
            buffers.append(buffer)
        return place.nbytes

    def _fill_bytes(self, weight: _Weight) -> int:
        """Bytes of buffer that loading a weight takes."""
        is_packed = self._format.format_of(weight.name, weight.shape) is not None
        own = weight.place.nbytes if is_packed or weight.place.tier == "disk" else 0
        return own + is_packed * prod(weight.shape) * self.dtype.itemsize

    def _dequantized(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a table, dequantized if they are quantized."""
        shape = self.plan.config.tensors(0)[name]
        form = self._format.format_of(name, shape)
        if form is None:
            return rows
        values = torch.empty(*rows.shape[:-1], shape[-1], dtype=self.dtype, device=rows.device)
        dequantize(rows, form, values)
        return values

    def _allocate_rows(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Allocate host memory for rows of a weight, in the format in which it is stored."""
        return self._stored_view(
            allocate_mapping(self._format.stored_bytes(name, shape)), 0, name, shape
        )

    def _stored_view(self, memory: Tensor, start: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """View of a weight in the format in which it is stored: uint8 if it is quantized."""
        nbytes, form = self._format.stored_bytes(name, shape), self._format.format_of(name, shape)
        dtype = torch.uint8 if form else TORCH_DTYPE[self._format.dtype_of(name)]
        stored = memory[start : start + nbytes].view(dtype)
        return stored.view(self._format.stored_shape(name, shape))


def _read_sinks(plan: StagePlan, source: WeightSource, tiers: Tiers) -> dict[int, Sinks]:
    """Read the sinks of each decoder layer; {} for a model without."""
    layers = plan.stage.decoders if plan.config.attention_sinks else ()
    shape, nbytes = (len(layers), plan.config.num_heads), sinks_bytes(plan)
    on_device, on_host = (
        tier.allocate("sinks", nbytes).view(torch.float32).view(shape)
        for tier in (tiers.gpu, tiers.cpu)
    )
    for layer, sinks in zip(layers, on_host, strict=True):
        source.read_into(layer, SINKS, sinks)
    on_device.copy_(on_host)
    return {layer: Sinks(*both) for layer, *both in zip(layers, on_device, on_host, strict=True)}


class DequantizeWorkspace:
    """Device memory into which a stage's quantized weights are dequantized.

    PROJECT, FINISH or OUT, EXPERTS and the head have a workspace each, because the device projects
    the next layer's first batch before it finishes this layer's last one.
    """

    def __init__(self, plan: StagePlan, tier: MemoryTier) -> None:
        self._plan = plan
        self._dtype = TORCH_DTYPE[plan.dtype]
        sizes = dequantized_bytes(plan)
        memory = tier.allocate("weights dequantized", sum(sizes.values()))
        self._memory = dict(zip(PARTS, memory.split(list(sizes.values())), strict=True))
        # {part: layer and group whose weights lie in its workspace}
        self._inside: dict[str, tuple[int, int]] = {}
        self._packed = cache(partial(quantized_shapes, plan))

    def tensors(self, op: Op, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: weights} for an op, dequantized unless an earlier batch's op has done it.

        stored: all weights of the op's layer, as they lie on the device.
        """
        part = part_of_op(op.kind, op.layer == self._plan.config.head_layer)
        shapes = self._packed(op.layer, part, op.group)
        if not shapes:
            return stored
        views = self._views(part, shapes)
        if self._inside.get(part) != (op.layer, op.group):
            for name, view in views.items():
                form = self._plan.weight_format.format_of(name, shapes[name])
                assert form is not None
                dequantize(stored[name], form, view)
            self._inside[part] = op.layer, op.group
        return stored | views

    def _views(self, part: str, shapes: dict[str, Shape]) -> dict[str, Tensor]:
        """{name: dequantized weight} in a part's workspace, one after the other."""
        views, memory, start = {}, self._memory[part], 0
        for name, shape in shapes.items():
            nbytes = prod(shape) * self._plan.element_bytes
            views[name] = memory[start : start + nbytes].view(self._dtype).view(shape)
            start += aligned(nbytes)
        return views
