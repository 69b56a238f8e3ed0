"""How much throughput a block's latency buys: the best plan for every latency.

Beside the zig-zag schedule stands the row-by-row one of earlier systems, which reloads all streamed
weights for every batch and keeps its cache on the GPU. Knows plans; draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from flexgen_ray.cost.corners import GROUPS, ON_DEVICE, Share
from flexgen_ray.cost.planner import Planner, Sketch

ROW_BY_ROW = (*(Share("weights", where) for where in GROUPS["weights"]), *ON_DEVICE[1:])


@dataclass(frozen=True)
class Point:
    """seconds: from a block's start to its last token; sequences: in flight together."""

    seconds: float
    tokens_per_s: float
    sequences: int


def frontiers(planner: Planner) -> dict[str, list[Point]]:
    """{schedule: its points, each the fastest within its latency, the quickest first}."""
    rows = replace(planner.search, batches=(1,), shares=ROW_BY_ROW, extra_blocks=(0,))
    return {
        "zig-zag": _best(_points(planner.sketches(), planner)),
        "row by row": _best(_points(replace(planner, search=rows).sketches(), planner)),
    }


def at_latency(points: list[Point], seconds: float) -> float:
    """Tokens/s within a latency; 0 if nothing is as quick."""
    return max((point.tokens_per_s for point in points if point.seconds <= seconds), default=0.0)


def _points(sketches: Iterable[Sketch], planner: Planner) -> list[Point]:
    return [
        Point(
            sketch.block_seconds,
            planner.job.mean_tokens / sketch.seconds_per_sequence,
            sketch.shape.block_size * (sketch.shape.blocks_in_flight or 1),
        )
        for sketch in sketches
    ]


def _best(points: list[Point]) -> list[Point]:
    """Those that no quicker one is as fast as."""
    found: list[Point] = []
    for point in sorted(points, key=lambda it: (it.seconds, -it.tokens_per_s)):
        if not found or point.tokens_per_s > found[-1].tokens_per_s:
            found.append(point)
    return found
