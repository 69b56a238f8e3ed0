"""Placement: turns a policy's fractions into whole tensors, experts and rows on each tier.

A fraction of 0.3 of ten tensors is no whole number of tensors in every layer, so pieces are handed
out one by one and the *running totals* follow the fraction, as error diffusion does in images: a
tier takes a piece if its total lags behind its due by half of the piece or more. With a fraction of
0.3 and pieces of sizes 4, 4, 2, 4 for the device:

    piece   due after it   assigned before   lag      half of it   device takes it
    4       1.2            0                 1.2      2            no
    4       2.4            0                 2.4      2            yes
    2       3.0            4                 -1.0     1            no
    4       4.2            4                 0.2      2            no

So 4 of 14 bytes (0.286) are on the device, and the next piece corrects what is missing. Large
pieces come first, since small ones can settle the rounding; this is the largest-remainder method
applied along the way. A layer's experts are stacked in one tensor a matrix, and these are cut
between experts: an expert is a piece, with all its matrices, and so many of them are handed out at
once.

This is the only place where a fraction is rounded: stores, sizes and planner read its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor

from flexgen_ray.config import TIERS, Placement, Policy
from flexgen_ray.models.config import SINKS, ModelConfig, experts_from
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.frame import Shape
from flexgen_ray.schedule.zigzag import StageLayers

ALIGNMENT = 64  # bytes; where a tensor may start inside a flat buffer
SECTOR = 4096  # bytes; what direct disk requests are made of
COPY_PIECE = 16 * 2**20  # bytes after which another copy may pass on the link of a GPU
Tensors = dict[str, Shape]


class FractionSplitter:
    """Divides pieces between two sides, so that the first side's running total follows a fraction.

    fraction: the first side's share of all pieces.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._assigned = 0.0
        self._total = 0.0

    def assign(self, size: float, whole: float = 0.0) -> bool:
        """Assign one piece; True if the first side takes it.

        The first side takes a piece if its total lags behind its due by half of the piece or more.
        whole: size of all pieces together, if known; the due is then the first side's share of the
        whole, so that pieces that come early may fill it.
        """
        self._total += size
        takes = self._fraction * max(self._total, whole) - self._assigned >= size / 2
        self._assigned += size * takes
        return takes

    def split(self, count: int, size: float = 1.0) -> int:
        """Divide `count` pieces of equal size; returns how many the first side takes."""
        self._total += count * size
        due = floor((self._fraction * self._total + size / 2 - self._assigned) / size)
        taken = min(max(due, 0), count)
        self._assigned += taken * size
        return taken


class TokenShare:
    """Chooses rows of each pass that hold a share of all passes' tokens."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._due = 0.0

    def choose(self, sizes: Sequence[int]) -> list[bool]:
        """True for each row that is chosen; the first ones are, as long as the share lasts."""
        self._due += self._fraction * sum(sizes)
        chosen = []
        for size in sizes:
            takes = self._fraction > 0 and (self._fraction == 1 or self._due >= size / 2)
            self._due -= size * takes
            chosen.append(takes)
        return chosen


class TierSplitter:
    """Divides pieces between the three tiers, so that running totals follow a placement.

    The device's pieces are chosen first and the others are then divided between host memory and
    disk, so the ratio of these two never changes what lies on the device.
    """

    def __init__(self, placement: Placement) -> None:
        off_device = placement.cpu + placement.disk
        self._fraction = placement.gpu
        self._device = FractionSplitter(placement.gpu)
        self._host = FractionSplitter(placement.cpu / off_device if off_device else 0.0)

    def assign(self, size: float, whole: float = 0.0) -> str:
        """Assign one piece; returns its tier. whole: size of all pieces together, if known."""
        if self._device.assign(size, whole):
            return "gpu"
        off_device = (1 - self._fraction) * whole
        return "cpu" if self._host.assign(size, off_device) else "disk"

    def split(self, count: int, size: float = 1.0) -> tuple[int, int, int]:
        """Divide `count` equal pieces; returns how many the GPU, the CPU and the disk take."""
        gpu = self._device.split(count, size)
        cpu = self._host.split(count - gpu, size)
        return gpu, cpu, count - gpu - cpu


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Bytes rounded up to a multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


def tensor_bytes(name: str, shape: Shape, weight_format: WeightFormat) -> int:
    """Bytes of one weight in a flat buffer, with padding."""
    return aligned(weight_format.stored_bytes(name, shape))


def stored_tensors(config: ModelConfig, stage: StageLayers, layer: int) -> Tensors:
    """{name: shape} of the weights that a layer stores where a policy puts them.

    A tied head in the same stage as its embedding has no copy of the embedding's table. Sinks are
    few numbers, which device and host both keep (sizes.sinks_bytes).
    """
    tensors = config.tensors(layer)
    tensors.pop(SINKS, None)
    if layer == config.head_layer and config.tie_word_embeddings and stage.first == 0:
        tensors = {name: shape for name, shape in tensors.items() if name != "embed_tokens.weight"}
    return tensors


@dataclass(frozen=True)
class Cut:
    """A weight as it lies on a tier: a whole one, or some experts of a stacked one.

    name: of the whole weight; shape: of this part. first: number of its first expert; None if the
    weight is whole.
    """

    name: str
    shape: Shape
    first: int | None = None

    @property
    def key(self) -> str:
        """Name by which the maths of a model knows it."""
        return self.name if self.first is None else experts_from(self.name, self.first)


@lru_cache(maxsize=256)
def place_weights(
    config: ModelConfig,
    stage: StageLayers,
    placement: Placement,
    weight_format: WeightFormat,
    group_bytes: int = 0,
) -> dict[int, dict[Cut, str]]:
    """{layer: {weight, or some of its experts: tier}} of every weight that a stage stores.

    The order of the pieces is: the embedding, the head, then the decoder layers; within a layer the
    largest tensor first, so that small tensors settle the rounding. The two ends come first and are
    compared with the device's share of the whole stage, because keeping them there saves most: a
    streamed table needs a device slot as large as itself. The embedding's tables are one piece,
    since they are looked up together.
    An expert is a piece; a layer's first experts are the device's, and its last the disk's.
    group_bytes: bytes of experts that lie side by side at most; 0 for all that are on a tier.
    """
    pieces = TierSplitter(placement)
    whole = _stage_bytes(config, stage, weight_format)
    tiers: dict[int, dict[Cut, str]] = {}
    ends = [layer for layer in stage.layers if layer in (config.embedding_layer, config.head_layer)]
    for layer in ends + [layer for layer in stage.layers if layer not in ends]:
        tensors = stored_tensors(config, stage, layer)
        stacks = {name: shape for name, shape in tensors.items() if is_stacked(shape)}
        sizes = {
            Cut(name, shape): tensor_bytes(name, shape, weight_format)
            for name, shape in tensors.items()
            if name not in stacks
        }
        if layer == config.embedding_layer:
            tiers[layer] = dict.fromkeys(sizes, pieces.assign(sum(sizes.values()), whole))
            continue
        expert = sum(weight_format.stored_bytes(*each) for each in stacks.items())
        expert //= config.num_experts or 1
        known = whole if layer in ends else 0.0
        largest_first = sorted(sizes, key=lambda cut: -sizes[cut])
        before = [cut for cut in largest_first if sizes[cut] >= expert]
        tiers[layer] = {cut: pieces.assign(sizes[cut], known) for cut in before}
        if stacks:
            counts = pieces.split(config.num_experts, expert)
            most = max(1, group_bytes // expert) if group_bytes else config.num_experts
            tiers[layer] |= _cut_experts(stacks, counts, most)
        after = largest_first[len(before) :]
        tiers[layer] |= {cut: pieces.assign(sizes[cut], known) for cut in after}
    return tiers


def is_stacked(shape: Shape) -> bool:
    """True for what a layer's experts have, which is stacked: [experts, out, in]."""
    return len(shape) == 3


def _cut_experts(stacks: Tensors, counts: tuple[int, int, int], most: int) -> dict[Cut, str]:
    """Tiers of a layer's experts, so many on each, with all their matrices; most: in one cut."""
    tiers: dict[Cut, str] = {}
    end = 0
    for tier, count in zip(TIERS, counts, strict=True):
        first, end = end, end + count
        for at in range(first, end, most):
            size = min(most, end - at)
            tiers |= {Cut(name, (size, *shape[1:]), at): tier for name, shape in stacks.items()}
    return tiers


def _stage_bytes(config: ModelConfig, stage: StageLayers, weight_format: WeightFormat) -> int:
    layers = (stored_tensors(config, stage, layer) for layer in stage.layers)
    return sum(tensor_bytes(*each, weight_format) for layer in layers for each in layer.items())


@dataclass(frozen=True)
class RowSplit:
    """Number of a batch's rows in each division, if all rows are equal.

    gpu: cache on the device; attended: in host memory, and attended by the host; streamed: in host
    memory, and streamed to the device; disk: on disk, and streamed to the device.
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


@lru_cache(maxsize=1024)
def split_rows(policy: Policy, num_blocks: int = 1) -> tuple[RowSplit, ...]:
    """Division of the rows of each batch, for the batches of all blocks.

    The rounding carries over from batch to batch, so the fractions hold over the block even if a
    batch has few rows: with one row a batch and cache.gpu = 0.25, one batch in four is on the GPU.
    """
    tiers = TierSplitter(policy.cache)
    attention = FractionSplitter(policy.cpu_attention)
    splits = []
    for _ in range(num_blocks * policy.num_gpu_batches):
        gpu, cpu, disk = tiers.split(policy.gpu_batch_size)
        attended = attention.split(cpu)
        splits.append(RowSplit(gpu, attended, cpu - attended, disk))
    return tuple(splits)


def split_tokens(placement: Placement, num_tokens: int) -> tuple[int, int, int]:
    """Tokens of hidden states on GPU, CPU and disk, in this order among the packed tokens."""
    gpu = round(placement.gpu * num_tokens)
    cpu = round((placement.gpu + placement.cpu) * num_tokens) - gpu
    return gpu, cpu, num_tokens - gpu - cpu
