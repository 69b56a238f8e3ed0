"""Times of small actions on a device, and of issuing them. Knows clocks; not what is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Action = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """Seconds of one action: on the device, and of the thread that issues it."""

    device_s: float
    issue_s: float

    @property
    def issue_us(self) -> float:
        """Microseconds of the thread that issues it."""
        return round(self.issue_s * 1e6, 2)

    def gb_per_s(self, nbytes: int) -> float:
        """Rate of an action that moves so many bytes; a GB is 1e9 bytes."""
        return round(nbytes / self.device_s / 1e9, 2)


def wait(device: torch.device) -> None:
    """Wait for all work of the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, action: Action, repeats: int = 20) -> Timed:
    """Mean times of an action that is repeated on the current stream, after one more run."""
    action()
    wait(device)
    started = time.perf_counter()
    if device.type != "cuda":
        for _ in range(repeats):
            action()
        seconds = (time.perf_counter() - started) / repeats
        return Timed(max(seconds, 1e-9), seconds)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        action()
    issued = time.perf_counter() - started
    end.record()
    end.synchronize()
    return Timed(max(begin.elapsed_time(end) / 1e3, 1e-9) / repeats, issued / repeats)


def issue_seconds(action: Action) -> float:
    """Seconds that the calling thread takes for one action, whatever the device does later."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
