"""How long a visit takes in the long run, by playing a few: what a planner judges plans by.

`predict.visit_seconds` is the bound that no run beats; this is what the schedule makes of it. Knows
plans, rates and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.demands import CoreShares, stream
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.cost.simulate import simulate_ring
from flexgen_ray.rows import Rows

FIRST_VISITS = 1  # in which lanes and slots fill
LAST_VISITS = 1


def steady_visit(plan: StagePlan, hardware: HardwareSpec, rows: Rows) -> float:
    """Seconds of a visit of a model in one stage, all of whose batches bring these rows."""
    return simulate_pipeline([plan], [hardware], rows)


def simulate_pipeline(
    plans: list[StagePlan],
    hardware: list[HardwareSpec],
    rows: Rows,
    core_shares: Sequence[CoreShares] | None = None,
) -> float:
    """Seconds from the end of one visit to that of the next, where plans are joined to a ring, each
    on hardware of its own, and every batch of every block brings these rows. core_shares: each
    stage's, as for `stream`."""
    num_blocks = plans[0].num_blocks
    filling, measured = FIRST_VISITS * num_blocks, LAST_VISITS * num_blocks
    streams = [
        replace(stream(plan, its, lambda op: rows, filling + measured, cores), keeps_spans=False)
        for plan, its, cores in zip(plans, hardware, core_shares or [()] * len(plans), strict=True)
    ]
    ends = simulate_ring(streams, num_blocks)[-1].visit_ends
    return (ends[-1] - ends[filling - 1]) / measured
