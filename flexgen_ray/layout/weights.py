"""Where each weight lies on its tier, and how a layer's weights off the device cross the link.

Off the device a weight takes whole pages and a layer's weights lie side by side, so that parts of
them move in few copies and as direct disk requests. Knows bytes; no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from flexgen_ray.config import TIERS, Placement
from flexgen_ray.layout.placement import PAGE, aligned, place_weights, stored_tensors, tensor_bytes
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.schedule.zigzag import StageLayers


@dataclass(frozen=True)
class Place:
    """Bytes start..start + nbytes of all weights on a tier: one weight, or several side by side."""

    tier: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """Bytes `start`.. of the weights on a tier, which belong at `target` of the device's slot."""

    start: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class StreamedWeights:
    """What of a layer crosses the link, as it lies in a device slot: host memory first, then disk.

    extents: in that order, whole pages each.
    """

    extents: tuple[Place, ...]

    def nbytes(self, tier: str) -> int:
        return sum(extent.nbytes for extent in self.extents if extent.tier == tier)

    def span(self, tier: str, part: int, num_parts: int) -> tuple[int, int]:
        """The range of the device slot that a part of this tier's bytes fills; whole pages."""
        first = self.nbytes("cpu") if tier == "disk" else 0
        pages = self.nbytes(tier) // PAGE
        low, high = (pages * number // num_parts * PAGE for number in (part, part + 1))
        return first + low, first + high

    def pieces(self, tier: str, part: int, num_parts: int) -> Iterator[Piece]:
        """Where a part of this tier's bytes lies: one piece for each extent it touches."""
        low, high = self.span(tier, part, num_parts)
        position = 0
        for extent in self.extents:
            start, stop = max(low, position), min(high, position + extent.nbytes)
            if start < stop and extent.tier == tier:
                yield Piece(extent.start + start - position, start, stop - start)
            position += extent.nbytes

    def target(self, place: Place) -> int:
        """Where in the device slot a streamed weight lies."""
        position = 0
        for extent in self.extents:
            inside = place.start - extent.start
            if extent.tier == place.tier and 0 <= inside < extent.nbytes:
                return position + inside
            position += extent.nbytes
        raise KeyError(place)


@dataclass(frozen=True)
class WeightLayout:
    """A stage's weights: their bytes by tier, {layer: {name: place}} of all that each layer uses,
    and the streams of the layers whose weights may cross the link."""

    nbytes: dict[str, int]
    places: dict[int, dict[str, Place]]
    streams: dict[int, StreamedWeights]

    @property
    def embeds_on_device(self) -> bool:
        """Whether embeddings are looked up there; of a model's first stage."""
        return all(place.tier == "gpu" for place in self.places[0].values())

    def largest(self, tier: str, num_parts: int) -> int:
        """Bytes of the largest part of any layer's bytes on this tier."""
        pages = max(stream.nbytes(tier) for stream in self.streams.values()) // PAGE
        return -(-pages // num_parts) * PAGE


@lru_cache(maxsize=256)
def lay_out_weights(
    config: ModelConfig, stage: StageLayers, placement: Placement, kept: WeightFormat
) -> WeightLayout:
    """The place of every weight of a stage, layer after layer on each tier."""
    used = dict.fromkeys(TIERS, 0)
    places: dict[int, dict[str, Place]] = {}
    for layer, tiers in place_weights(config, stage, placement, kept).items():
        shapes = stored_tensors(config, stage, layer)
        places[layer] = {}
        for name, tier in tiers.items():
            nbytes = tensor_bytes(name, shapes[name], kept)
            place = Place(tier, used[tier], nbytes if tier == "gpu" else aligned(nbytes, PAGE))
            places[layer][name] = place
            used[tier] += place.nbytes
    everywhere = {layer: _used(config, places, layer) for layer in places}
    streams = {layer: _stream(everywhere[layer]) for layer in stage.with_weights}
    return WeightLayout(used, everywhere, streams)


def _used(config: ModelConfig, places: dict[int, dict[str, Place]], layer: int) -> dict[str, Place]:
    """Of all weights a layer uses; a tied head's table lies with the embedding."""
    own = places[layer]
    return {name: own.get(name) or places[0][name] for name in config.tensors(layer)}


def _stream(places: dict[str, Place]) -> StreamedWeights:
    """Joins what lies side by side."""
    extents: list[Place] = []
    for tier in ("cpu", "disk"):
        found = (place for place in places.values() if place.tier == tier)
        for place in sorted(found, key=lambda place: place.start):
            last = extents[-1] if extents else None
            if last and last.tier == tier and last.start + last.nbytes == place.start:
                extents[-1] = Place(tier, last.start, last.nbytes + place.nbytes)
            else:
                extents.append(place)
    return StreamedWeights(tuple(extents))
