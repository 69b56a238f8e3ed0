"""How far a run is, for whoever asks from another thread: a stage that stands still looks alive."""

from __future__ import annotations

import time
from dataclasses import dataclass

from flexgen_ray.runtime.lanes import Run
from flexgen_ray.runtime.meter import Timing
from flexgen_ray.schedule.ops import EXCHANGE, LANE, Lane, Op


@dataclass(frozen=True)
class Pulse:
    """num_ops: that have ended. seconds: how long the oldest op that depends on no neighbour has
    been under way, and which that is."""

    num_ops: int = 0
    seconds: float = 0.0
    op: str = ""


class Watch:
    """Runs ops, and knows which are under way."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._num_ops = 0
        self._under_way: dict[Lane, tuple[float, Op]] = {}

    def __call__(self, op: Op, ready_at: float) -> Timing | None:
        lane = LANE[op.kind]
        self._under_way[lane] = time.monotonic(), op
        try:
            return self._run(op, ready_at)
        finally:
            del self._under_way[lane]
            self._num_ops += 1

    def pulse(self) -> Pulse:
        # Who waits for a neighbour is not to blame.
        own = [it for it in list(self._under_way.values()) if it[1].kind not in EXCHANGE]
        if not own:
            return Pulse(self._num_ops)
        began, op = min(own, key=lambda it: it[0])
        return Pulse(self._num_ops, time.monotonic() - began, f"{op.kind} of layer {op.layer}")
