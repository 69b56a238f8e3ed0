"""Turns fractions into whole tensors and whole rows, so that running totals follow the fractions.

The one place where a fraction is rounded: stores, sizes and planner all read its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flexgen_ray.config import DTYPE_BYTES, TIERS, ModelConfig, Placement, Policy
from flexgen_ray.schedule.zigzag import StageLayers

ALIGNMENT = 64  # bytes; where a tensor may start inside a flat buffer
Tensors = dict[str, tuple[int, ...]]


class Apportionment:
    """Hands indivisible pieces to tiers; each goes where the running total lags most."""

    def __init__(self, placement: Placement) -> None:
        self._fractions = placement.fractions
        self._given = [0.0, 0.0, 0.0]
        self._total = 0.0

    def give(self, size: float) -> int:
        """Index into TIERS of the tier that takes a piece of this size."""
        self._total += size
        lag = [
            fraction * self._total - given if fraction else float("-inf")
            for fraction, given in zip(self._fractions, self._given, strict=True)
        ]
        tier = lag.index(max(lag))
        self._given[tier] += size
        return tier

    def take(self, count: int) -> list[int]:
        """How many of `count` unit pieces each tier takes."""
        counts = [int(fraction * count) for fraction in self._fractions]
        for tier, each in enumerate(counts):
            self._given[tier] += each
            self._total += each
        for _ in range(count - sum(counts)):
            counts[self.give(1)] += 1
        return counts


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one weight in a flat buffer, its padding included."""
    count = 1
    for length in shape:
        count *= length
    return aligned(count * DTYPE_BYTES[dtype])


def stored_tensors(config: ModelConfig, stage: StageLayers, layer: int) -> Tensors:
    """The weights a layer stores itself: a tied head beside its embedding has no second copy."""
    tensors = config.tensors(layer)
    if layer == config.head_layer and config.tie_word_embeddings and stage.first == 0:
        tensors = {name: shape for name, shape in tensors.items() if name != "embed_tokens.weight"}
    return tensors


@lru_cache(maxsize=256)
def place_weights(
    config: ModelConfig, stage: StageLayers, placement: Placement, dtype: str
) -> dict[int, dict[str, str]]:
    """The tier of every weight a stage stores: {layer: {name: tier}}.

    Largest tensors of a layer first, and the two ends of the model before its middle, so that small
    tensors settle the rounding. The embedding's tables are one piece: they are looked up together.
    """
    pieces = Apportionment(placement)
    tiers: dict[int, dict[str, str]] = {}
    ends = [layer for layer in stage.layers if layer in (config.embedding_layer, config.head_layer)]
    for layer in ends + [layer for layer in stage.layers if layer not in ends]:
        tensors = stored_tensors(config, stage, layer)
        sizes = {name: tensor_bytes(shape, dtype) for name, shape in tensors.items()}
        if layer == config.embedding_layer:
            tiers[layer] = dict.fromkeys(sizes, TIERS[pieces.give(sum(sizes.values()))])
        else:
            largest_first = sorted(sizes, key=lambda name: -sizes[name])
            tiers[layer] = {name: TIERS[pieces.give(sizes[name])] for name in largest_first}
    return tiers


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
def split_rows(policy: Policy, stage: StageLayers) -> dict[tuple[int, int], RowSplit]:
    """The division of every (decoder layer, batch) of a stage.

    The rounding is carried from cell to cell, so a fraction holds over the stage however few slots
    a batch has.
    """
    rows = Apportionment(policy.cache)
    share = Apportionment(Placement(policy.cpu_attention, 1 - policy.cpu_attention))
    split = {}
    for layer in stage.layers:
        if stage.kind(layer) != "decoder":
            continue
        for batch in range(policy.num_gpu_batches):
            gpu, cpu, disk = rows.take(policy.gpu_batch_size)
            attended, streamed, _ = share.take(cpu)
            split[layer, batch] = RowSplit(gpu, attended, streamed, disk)
    return split


def split_tokens(placement: Placement, num_tokens: int) -> tuple[int, int, int]:
    """Tokens of hidden states on each tier: the first on the device, the last on disk."""
    gpu = round(placement.gpu * num_tokens)
    cpu = round((placement.gpu + placement.cpu) * num_tokens) - gpu
    return gpu, cpu, num_tokens - gpu - cpu
