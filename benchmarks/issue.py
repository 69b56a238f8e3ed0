"""Is Python fast enough to issue ops? CPU time of one thread for each op of the schedule.

Claim: issuing an op (generating it, finding its dependencies, queueing it) costs a few
microseconds, far less than an op of a large model takes. All lanes run ops that do nothing, so only
the issuing thread's own CPU time counts.

Good: `median_us_per_op` around 10 or less.
docs/results/issue-cpu.json: python -m benchmarks.issue --json FILE
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from benchmarks import gate
from benchmarks.command import run_as_command
from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench.runs import beside
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.runtime.executor import AsyncExecutor
from flexgen_ray.runtime.lanes import divide_cores, make_lane_workers
from flexgen_ray.schedule.ops import Op
from flexgen_ray.schedule.zigzag import StageLayers, zigzag

VISITS = 8


def issue(
    layers: Annotated[int, typer.Option(metavar="N", min=1, help="Decoder layers.")] = 48,
    batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches in a block.")] = 4,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, help="Measurements; the median counts.")
    ] = 5,
    json_file: JsonOption = None,
) -> None:
    """Measure the microseconds of CPU time that issuing an op costs, over a whole schedule.

    Example: python -m benchmarks.issue --layers 48 --batches 4
    """
    watch = OtherLoad()
    costs = sorted(_issue(layers, batches) for _ in range(repeats))
    result: dict = {
        "layers": layers,
        "batches": batches,
        "us_per_op": [round(cost, 2) for cost in costs],
    }
    result |= {"median_us_per_op": round(costs[repeats // 2], 2)} | beside(watch)
    gate.finish(result, "none", json_file, rests_on=())


def _issue(layers: int, batches: int) -> float:
    """Microseconds per op of the issuing thread alone, while the lanes run ops that do nothing."""
    count = 0

    def counted() -> Iterator[Op]:
        nonlocal count
        for op in zigzag(StageLayers.whole(layers), batches, range(VISITS)):
            count += 1
            yield op

    workers = make_lane_workers(torch.device("cpu"), divide_cores(1, False, False))
    executor = AsyncExecutor(lambda op, ready_at: None, lambda op: True, workers)
    started = time.thread_time()
    for _ in executor.run(counted()):
        pass
    return (time.thread_time() - started) / count * 1e6


if __name__ == "__main__":
    run_as_command(issue)
