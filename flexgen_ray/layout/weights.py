"""Layout of weights: the place of each weight on its tier, and the stream of each layer.

Off the device a weight takes whole sectors, and a layer's weights lie side by side, so a part of
them moves in few copies and in direct disk requests. Knows bytes; no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from flexgen_ray.config import TIERS, Placement
from flexgen_ray.layout.placement import (
    SECTOR,
    Cut,
    aligned,
    place_weights,
    tensor_bytes,
)
from flexgen_ray.models.config import SINKS, ModelConfig
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.frame import Shape
from flexgen_ray.schedule.zigzag import StageLayers


@dataclass(frozen=True)
class Place:
    """Bytes start..start + nbytes of the weights on a tier: one weight, or several side by side."""

    tier: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """One copy of a stream: nbytes from `start` of a tier to `target` of the device slot."""

    start: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class StreamedWeights:
    """Weights of one layer that cross the link, in the order of their bytes in a device slot.

    extents: places in host memory first, then on disk, of whole sectors each.
    """

    extents: tuple[Place, ...]

    def nbytes(self, tier: str) -> int:
        return sum(extent.nbytes for extent in self.extents if extent.tier == tier)

    def span(self, tier: str, part: int, num_parts: int) -> tuple[int, int]:
        """Range of the device slot, in whole sectors, that a part of this tier's bytes fills."""
        first = self.nbytes("cpu") if tier == "disk" else 0
        sectors = self.nbytes(tier) // SECTOR
        low, high = (sectors * number // num_parts * SECTOR for number in (part, part + 1))
        return first + low, first + high

    def pieces(self, tier: str, part: int, num_parts: int) -> Iterator[Piece]:
        """Yield the copies of a part of this tier's bytes, one for each extent that it touches."""
        low, high = self.span(tier, part, num_parts)
        position = 0
        for extent in self.extents:
            start, stop = max(low, position), min(high, position + extent.nbytes)
            if start < stop and extent.tier == tier:
                yield Piece(extent.start + start - position, start, stop - start)
            position += extent.nbytes

    def target(self, place: Place) -> int:
        """Offset of a streamed weight in the device slot."""
        position = 0
        for extent in self.extents:
            inside = place.start - extent.start
            if extent.tier == place.tier and 0 <= inside < extent.nbytes:
                return position + inside
            position += extent.nbytes
        raise KeyError(place)


@dataclass(frozen=True)
class ExpertGroup:
    """Some of a layer's experts, which lie on one tier; off the device they stream together.

    keys: of their weights; stream: their way to the device.
    """

    tier: str
    keys: tuple[str, ...]
    stream: StreamedWeights


@dataclass(frozen=True)
class WeightLayout:
    """Layout of a stage's weights.

    nbytes: bytes on each tier; cuts: {layer: {key: weight, or some of its experts}} of all that a
    layer uses, and places: {layer: {key: place}} of these; streams: {layer: weights that cross the
    link}, of the layers whose weights may. groups: {layer: groups of experts}, the device's first,
    of mixtures whose experts stream apart from their layer's other weights.
    """

    nbytes: dict[str, int]
    cuts: dict[int, dict[str, Cut]]
    places: dict[int, dict[str, Place]]
    streams: dict[int, StreamedWeights]
    groups: dict[int, tuple[ExpertGroup, ...]]

    @property
    def embeds_on_device(self) -> bool:
        """True if a model's first stage looks embeddings up on the device."""
        return all(place.tier == "gpu" for place in self.places[0].values())

    def shapes(self, layer: int) -> dict[str, Shape]:
        """{key: shape} of all weights that a layer uses; none at a stage's entry and exit."""
        return {key: cut.shape for key, cut in self.cuts.get(layer, {}).items()}

    def largest_group(self, *tiers: str) -> int:
        """Bytes of the largest group of experts on these tiers."""
        groups = (group for of_layer in self.groups.values() for group in of_layer)
        on_tiers = (group.stream for group in groups if group.tier in tiers)
        return max((sum(map(stream.nbytes, tiers)) for stream in on_tiers), default=0)

    def largest(self, tier: str, num_parts: int) -> int:
        """Bytes of the largest of num_parts equal parts of any layer's bytes on this tier."""
        sectors = max(stream.nbytes(tier) for stream in self.streams.values()) // SECTOR
        return -(-sectors // num_parts) * SECTOR


@lru_cache(maxsize=256)
def lay_out_weights(
    config: ModelConfig,
    stage: StageLayers,
    placement: Placement,
    weight_format: WeightFormat,
    group_bytes: int = 0,
) -> WeightLayout:
    """Lay out every weight of a stage, layer after layer on each tier.

    group_bytes: of the groups in which experts stream, if they do so apart; else 0.
    """
    nbytes = dict.fromkeys(TIERS, 0)
    placed: dict[int, dict[Cut, Place]] = {}
    placements = place_weights(config, stage, placement, weight_format, group_bytes)
    for layer, tiers in placements.items():
        placed[layer] = {}
        for cut, tier in tiers.items():
            size = tensor_bytes(cut.name, cut.shape, weight_format)
            place = Place(tier, nbytes[tier], size if tier == "gpu" else aligned(size, SECTOR))
            placed[layer][cut] = place
            nbytes[tier] += place.nbytes
    used = {layer: _used(config, placed, layer) for layer in placed}
    cuts = {layer: {cut.key: cut for cut in places} for layer, places in used.items()}
    places = {layer: {cut.key: own[cut] for cut in own} for layer, own in used.items()}
    groups = {}
    if group_bytes:
        mixtures = filter(config.has_experts, stage.decoders)
        groups = {layer: _groups(cuts[layer], places[layer]) for layer in mixtures}
    streams = {}
    for layer in stage.with_weights:
        apart = {key for group in groups.get(layer, ()) for key in group.keys}
        streams[layer] = _stream({key: at for key, at in places[layer].items() if key not in apart})
    return WeightLayout(nbytes, cuts, places, streams, groups)


def _groups(cuts: dict[str, Cut], places: dict[str, Place]) -> tuple[ExpertGroup, ...]:
    """Groups of a layer's experts, in the order of the experts."""
    keys: dict[int, list[str]] = {}
    for key, cut in cuts.items():
        if cut.first is not None:
            keys.setdefault(cut.first, []).append(key)
    return tuple(
        ExpertGroup(
            places[keys[first][0]].tier,
            tuple(keys[first]),
            _stream({key: places[key] for key in keys[first]}),
        )
        for first in sorted(keys)
    )


def _used(config: ModelConfig, placed: dict[int, dict[Cut, Place]], layer: int) -> dict[Cut, Place]:
    """Places of all weights that a layer uses; a tied head's table lies with the embedding."""
    own = placed[layer]
    missing = config.tensors(layer).keys() - {cut.name for cut in own} - {SINKS}
    if not missing:
        return own
    return own | {cut: place for cut, place in placed[0].items() if cut.name in missing}


def _stream(places: dict[str, Place]) -> StreamedWeights:
    """Stream of a layer's weights off the device; places that lie side by side are joined."""
    extents: list[Place] = []
    for tier in ("cpu", "disk"):
        on_tier = (place for place in places.values() if place.tier == tier)
        for place in sorted(on_tier, key=lambda place: place.start):
            last = extents[-1] if extents else None
            if last and last.tier == tier and last.start + last.nbytes == place.start:
                extents[-1] = Place(tier, last.start, last.nbytes + place.nbytes)
            else:
                extents.append(place)
    return StreamedWeights(tuple(extents))
