"""What other processes, and other machines on the same host, take of the cores meanwhile."""

from __future__ import annotations

import time

import psutil


class Elsewhere:
    """Counts from when it is made. `cores`: that others have kept busy since, on average; from a
    few tenths up, figures taken meanwhile mean little."""

    def __init__(self) -> None:
        self._busy, self._began = _busy_elsewhere(), time.perf_counter()

    @property
    def cores(self) -> float:
        seconds = time.perf_counter() - self._began
        return max((_busy_elsewhere() - self._busy) / seconds, 0.0)


def _busy_elsewhere() -> float:
    """Processor seconds since boot that this process didn't use and that weren't idle."""
    cpu = psutil.cpu_times()
    return sum(cpu) - cpu.idle - cpu.iowait - cpu.guest - cpu.guest_nice - time.process_time()
