"""Measures what the schedule's own Python takes of the thread that issues a GPU's ops.

Knows the executor; ops that do nothing run in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from flexgen_ray.runtime.executor import AsyncExecutor
from flexgen_ray.runtime.lanes import divide_cores, make_lane_workers
from flexgen_ray.schedule.ops import ON_STREAMS, Op
from flexgen_ray.schedule.zigzag import StageLayers, zigzag

_LAYERS, _BATCHES, _VISITS = 12, 4, 4


def issue_seconds(device: torch.device) -> float:
    """Seconds for each op on a stream: generating and queueing it, and its events.

    Ops of other lanes, which threads of their own take, are generated on the way; what that takes
    counts as well, for it holds up the same Python.
    """
    issued = 0

    def counted() -> Iterator[Op]:
        nonlocal issued
        for op in zigzag(StageLayers.whole(_LAYERS), _BATCHES, range(_VISITS)):
            issued += op.lane in ON_STREAMS
            yield op

    workers = make_lane_workers(device, divide_cores(2, device.type == "cuda", False))
    executor = AsyncExecutor(lambda op, ready_at: None, lambda op: True, workers)
    began = time.perf_counter()
    for _ in executor.run(counted()):
        pass
    return (time.perf_counter() - began) / issued
