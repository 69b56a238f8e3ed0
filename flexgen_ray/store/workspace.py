"""Where packed weights are unpacked on the device: once a layer and pass, for all batches.

What PROJECT takes, what FINISH takes and the head have a workspace each, for the device projects
the next layer's first batch before it finishes this layer's last. Knows bytes; no maths.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from flexgen_ray.cost.formats import PARTS, Shape, part_of_op
from flexgen_ray.cost.placement import aligned
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.sizes import unpacked_bytes
from flexgen_ray.quant.quantize import unpack
from flexgen_ray.schedule.ops import Op
from flexgen_ray.store.memory import MemoryTier
from flexgen_ray.store.tier import TORCH_DTYPE


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
