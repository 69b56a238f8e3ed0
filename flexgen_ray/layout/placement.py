"""Turns fractions into whole tensors and whole rows, so that running totals follow the fractions.

The one place where a fraction is rounded: stores, sizes and planner all read its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import floor

from flexgen_ray.config import Placement, Policy
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.quant.formats import Shape, WeightFormat
from flexgen_ray.schedule.zigzag import StageLayers

ALIGNMENT = 64  # bytes; where a tensor may start inside a flat buffer
PAGE = 4096  # bytes; what direct disk requests are made of
Tensors = dict[str, Shape]


class FractionSplitter:
    """Hands indivisible pieces to one of two sides so that the running total follows a fraction."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._assigned = 0.0
        self._total = 0.0

    def assign(self, size: float, whole: float = 0.0) -> bool:
        """True if the first side takes a piece of this size: if it lags by half of it or more.

        whole: what all pieces will sum to; a piece that comes early is judged by its share of that.
        """
        self._total += size
        takes = self._fraction * max(self._total, whole) - self._assigned >= size / 2
        self._assigned += size * takes
        return takes

    def split(self, count: int) -> int:
        """How many of `count` unit pieces the first side takes."""
        self._total += count
        due = floor(self._fraction * self._total + 0.5 - self._assigned)
        taken = min(max(due, 0), count)
        self._assigned += taken
        return taken


class TierSplitter:
    """Hands pieces to the three tiers: device or not first, so that how the rest is divided between
    host memory and disk never changes what lies on the device."""

    def __init__(self, placement: Placement) -> None:
        off_device = placement.cpu + placement.disk
        self._fraction = placement.gpu
        self._device = FractionSplitter(placement.gpu)
        self._host = FractionSplitter(placement.cpu / off_device if off_device else 0.0)

    def assign(self, size: float, whole: float = 0.0) -> str:
        """The tier that takes a piece of this size out of a whole, if that is known."""
        if self._device.assign(size, whole):
            return "gpu"
        off_device = (1 - self._fraction) * whole
        return "cpu" if self._host.assign(size, off_device) else "disk"

    def split(self, count: int) -> tuple[int, int, int]:
        """How many of `count` unit pieces each tier takes."""
        gpu = self._device.split(count)
        cpu = self._host.split(count - gpu)
        return gpu, cpu, count - gpu - cpu


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


def tensor_bytes(name: str, shape: Shape, kept: WeightFormat) -> int:
    """Bytes of one weight in a flat buffer, its padding included."""
    return aligned(kept.stored_bytes(name, shape))


def stored_tensors(config: ModelConfig, stage: StageLayers, layer: int) -> Tensors:
    """The weights a layer stores itself: a tied head beside its embedding has no second copy."""
    tensors = config.tensors(layer)
    if layer == config.head_layer and config.tie_word_embeddings and stage.first == 0:
        tensors = {name: shape for name, shape in tensors.items() if name != "embed_tokens.weight"}
    return tensors


@lru_cache(maxsize=256)
def place_weights(
    config: ModelConfig, stage: StageLayers, placement: Placement, kept: WeightFormat
) -> dict[int, dict[str, str]]:
    """The tier of every weight a stage stores: {layer: {name: tier}}.

    Largest tensors of a layer first, and the two ends of the model before its middle, so that small
    tensors settle the rounding. The ends are judged by the whole model's share: what stays on the
    device of them saves most, for a table needs a slot as large as itself to stream through. The
    embedding's tables are one piece: they are looked up together.
    """
    pieces = TierSplitter(placement)
    whole = _stage_bytes(config, stage, kept)
    tiers: dict[int, dict[str, str]] = {}
    ends = [layer for layer in stage.layers if layer in (config.embedding_layer, config.head_layer)]
    for layer in ends + [layer for layer in stage.layers if layer not in ends]:
        tensors = stored_tensors(config, stage, layer)
        sizes = {name: tensor_bytes(name, shape, kept) for name, shape in tensors.items()}
        if layer == config.embedding_layer:
            tiers[layer] = dict.fromkeys(sizes, pieces.assign(sum(sizes.values()), whole))
        else:
            largest_first = sorted(sizes, key=lambda name: -sizes[name])
            of = whole if layer in ends else 0.0
            tiers[layer] = {name: pieces.assign(sizes[name], of) for name in largest_first}
    return tiers


def _stage_bytes(config: ModelConfig, stage: StageLayers, kept: WeightFormat) -> int:
    layers = (stored_tensors(config, stage, layer) for layer in stage.layers)
    return sum(tensor_bytes(*each, kept) for layer in layers for each in layer.items())


@dataclass(frozen=True)
class RowSplit:
    """How the slots of one (layer, batch) are divided; slots lie in this order.

    gpu: cache on the device; attended: in host memory and attended there; streamed: in host memory
    and streamed to the device; disk: on disk, and streamed.
    """

    gpu: int
    attended: int
    streamed: int
    disk: int

    @property
    def cpu(self) -> int:
        return self.attended + self.streamed

    @property
    def off_device(self) -> int:
        return self.cpu + self.disk

    @property
    def tiers(self) -> tuple[int, int, int]:
        return self.gpu, self.cpu, self.disk


@lru_cache(maxsize=256)
def split_rows(
    policy: Policy, stage: StageLayers, num_blocks: int = 1
) -> dict[tuple[int, int], RowSplit]:
    """The division of every (decoder layer, batch) of a stage, for the batches of all blocks.

    The rounding is carried from cell to cell, so a fraction holds over the stage however few slots
    a batch has.
    """
    rows = TierSplitter(policy.cache)
    share = FractionSplitter(policy.cpu_attention)
    split = {}
    for layer in stage.layers:
        if stage.kind(layer) != "decoder":
            continue
        for batch in range(num_blocks * policy.num_gpu_batches):
            gpu, cpu, disk = rows.split(policy.gpu_batch_size)
            attended = share.split(cpu)
            split[layer, batch] = RowSplit(gpu, attended, cpu - attended, disk)
    return split


def split_tokens(placement: Placement, num_tokens: int) -> tuple[int, int, int]:
    """Tokens of hidden states on each tier: the first on the device, the last on disk."""
    gpu = round(placement.gpu * num_tokens)
    cpu = round((placement.gpu + placement.cpu) * num_tokens) - gpu
    return gpu, cpu, num_tokens - gpu - cpu
