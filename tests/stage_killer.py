"""A thread that kills stages of a run on Ray, and a pace slow enough to hit them."""

from __future__ import annotations

import os
import signal
import threading
import time

import ray

from benchmarks.emulation import emulated
from flexgen_ray import LLM
from flexgen_ray.config import HardwareSpec


class Killer(threading.Thread):
    """Sends a signal to a stage's process, and to the next when its moment has come.

    moments: (seconds since the run began or the last signal, stage).
    """

    def __init__(self, llm: LLM, moments: list[tuple[float, int]], how: signal.Signals) -> None:
        super().__init__()
        self.llm, self.moments, self.how = llm, moments, how
        self.killed_at: list[float] = []
        self.is_over = threading.Event()

    def run(self) -> None:
        for seconds, stage in self.moments:
            if self.is_over.wait(seconds):
                return
            actor = self.llm.backend.actors[stage]
            try:
                pid = ray.get(actor.pid.remote())
            except (ray.exceptions.RayActorError, AttributeError):
                continue  # it is dead already
            os.kill(pid, self.how)
            self.killed_at.append(time.time())


# A visit of the tiny models takes some hundredths of a second at this pace.
SLOW = emulated(HardwareSpec(*[1e12] * 6, device_flops_per_s=5e6, device_bytes_per_s=1e12))
