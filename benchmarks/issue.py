"""What issuing an op costs: generating it, finding what it waits for, queueing it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from benchmarks.command import run_as_command
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.reporting.result import finish
from flexgen_ray.runtime.executor import AsyncExecutor
from flexgen_ray.runtime.lanes import divide_cores, make_lane_workers
from flexgen_ray.schedule.ops import Op
from flexgen_ray.schedule.zigzag import StageLayers, zigzag

VISITS = 8


def issue(
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 48,
    batches: Annotated[int, typer.Option(min=1, help="Batches a block.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="The median of so many counts.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Microseconds of CPU that issuing an op costs, every op of the schedule counted.

    Example: python -m benchmarks.issue --layers 48 --batches 4
    """
    costs = sorted(_issue(layers, batches) for _ in range(repeats))
    result = {"layers": layers, "batches": batches, "us_per_op": [round(it, 2) for it in costs]}
    finish(result | {"median_us_per_op": round(costs[repeats // 2], 2)}, "none", json_file)


def _issue(layers: int, batches: int) -> float:
    """Of the issuing thread alone, while every lane runs ops that do nothing."""
    count = 0

    def counted() -> Iterator[Op]:
        nonlocal count
        for op in zigzag(StageLayers.whole(layers), batches, range(VISITS)):
            count += 1
            yield op

    crews = make_lane_workers(torch.device("cpu"), divide_cores(1, False, False))
    executor = AsyncExecutor(lambda op, ready_at: None, lambda op: True, crews)
    started = time.thread_time()
    for _ in executor.run(counted()):
        pass
    return (time.thread_time() - started) / count * 1e6


if __name__ == "__main__":
    run_as_command(issue)
