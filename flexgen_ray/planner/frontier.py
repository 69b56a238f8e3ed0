"""Frontiers of a job: how much throughput a block's latency buys.

One is for the zig-zag schedule, the other for the row-by-row schedule of earlier systems, which
reloads all streamed weights for every batch and keeps its cache on the GPU.

The module knows candidates and their times, which search.py makes; it draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexgen_ray.planner.corners import GROUPS, ON_DEVICE, Share
from flexgen_ray.planner.search import Planner

ROW_BY_ROW = (*(Share("weights", place) for place in GROUPS["weights"]), *ON_DEVICE[1:])


@dataclass(frozen=True)
class Point:
    """A point of a frontier: how fast a block of this latency can be.

    seconds: from a block's start to its last token. sequences: in flight together.
    """

    seconds: float
    tokens_per_s: float
    sequences: int


def find_frontiers(planner: Planner) -> dict[str, list[Point]]:
    """{schedule: points, each the fastest within its latency}, the shortest latency first."""
    rows = replace(planner.search, batches=(1,), shares=ROW_BY_ROW, extra_blocks=(0,))
    return {
        "zig-zag": _frontier(planner),
        "row by row": _frontier(replace(planner, search=rows)),
    }


def throughput_within(points: list[Point], seconds: float) -> float:
    """Tokens/s of the fastest point within a latency; 0 if there is none."""
    return max((point.tokens_per_s for point in points if point.seconds <= seconds), default=0.0)


def _frontier(planner: Planner) -> list[Point]:
    """The Pareto-optimal candidates: no other has more throughput at a shorter latency."""
    points = [
        Point(
            candidate.block_seconds,
            planner.job.mean_tokens / candidate.seconds_per_sequence,
            candidate.shape.block_size * (candidate.shape.blocks_in_flight or 1),
        )
        for candidate in planner.all_candidates()
    ]
    frontier: list[Point] = []
    for point in sorted(points, key=lambda it: (it.seconds, -it.tokens_per_s)):
        if not frontier or point.tokens_per_s > frontier[-1].tokens_per_s:
            frontier.append(point)
    return frontier
