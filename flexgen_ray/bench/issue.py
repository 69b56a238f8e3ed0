"""What issuing an op costs: generating it, finding what it waits for, queueing it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from flexgen_ray.bench.result import finish
from flexgen_ray.options import JsonOption
from flexgen_ray.runtime.lanes import Crew, Lanes, Ticket
from flexgen_ray.runtime.meter import Meter
from flexgen_ray.schedule.dependencies import Dependencies
from flexgen_ray.schedule.ops import Lane
from flexgen_ray.schedule.zigzag import StageLayers, zigzag

VISITS = 4


def issue(
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 48,
    batches: Annotated[int, typer.Option(help="Batches a block.")] = 4,
    repeats: Annotated[int, typer.Option(help="The median of so many counts.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Microseconds of Python that issuing an op costs, every op of the schedule counted.

    Example: flexgen-ray bench issue --layers 48 --batches 4
    """
    costs = sorted(_issue(layers, batches) for _ in range(repeats))
    result = {"layers": layers, "batches": batches, "us_per_op": [round(it, 2) for it in costs]}
    finish(result | {"median_us_per_op": round(costs[repeats // 2], 2)}, "none", json_file)


def _issue(layers: int, batches: int) -> float:
    """Nobody runs the ops: every dependency is still open, the dearest case."""
    lanes = Lanes(lambda op, ready_at: None, [Crew((lane,)) for lane in Lane], Meter())
    dependencies: Dependencies[Ticket] = Dependencies()
    started, count = time.perf_counter(), 0
    for op in zigzag(StageLayers.whole(layers), batches, range(VISITS)):
        ticket = Ticket(count, op)
        lanes.issue(ticket, dependencies.of(ticket, op))
        count += 1
    return (time.perf_counter() - started) / count * 1e6
