"""Emulated hardware: no op ends before its modelled end, resources shared.

An op begins, in emulated time, when its lane is free and what it waits for has ended; alone it
takes the seconds of the resource it needs longest, and ops that together need more of a resource
than there is are slowed alike. It is held until that time has come. Where the emulation itself is
late, for Python is slow, the next ops are held less, until it has caught up. Knows amounts and
rates; not what ops do.
"""

from __future__ import annotations

import ctypes
import threading
import time

from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.resources import Amounts, Resource, demand_of, speed

LONGEST_SLEEP = 0.1  # seconds until a cancelled op notices
WAKING = 1e-4  # seconds
_PR_SET_TIMERSLACK = 29
_is_precise = threading.local()


class Pacer:
    """time_scale: wall seconds that one modelled second takes."""

    def __init__(self, hardware: HardwareSpec, time_scale: float) -> None:
        self._hardware = hardware
        self._time_scale = time_scale
        self._changed = threading.Condition()
        self._running: set[Paced] = set()
        self._load: dict[str, float] = dict.fromkeys(Resource, 0.0)
        self._is_cancelled = False

    def begin(self, amounts: Amounts, ready_at: float) -> Paced:
        """An op takes these amounts, from `ready_at` (perf_counter) on; from now if that is 0."""
        demand = demand_of(amounts, self._hardware)
        seconds = demand.seconds * self._time_scale
        with self._changed:
            now = time.perf_counter()
            job = Paced(seconds, demand.shares, min(ready_at or now, now))
            self._admit(job, 1, now)
        return job

    def end(self, job: Paced) -> None:
        """Returns when the op has had its seconds; job.ended is then its emulated end."""
        _sleep_precisely()
        while True:
            with self._changed:
                now = time.perf_counter()
                self._advance(now)
                left = job.remaining / self._speed(job)
                if left <= 0 or self._is_cancelled:
                    job.ended = min(now + left, now)
                    self._admit(job, -1, now)
                    return
                if self._is_short():
                    # Whoever leaves a scarce resource wakes those it slowed.
                    self._changed.wait(left)
                    continue
            # A thread wakes a little late; the rest is waited for awake, and others may run.
            time.sleep(min(max(left - WAKING, 0.0), LONGEST_SLEEP))

    def cancel(self) -> None:
        """Nobody is held any longer."""
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()

    def _admit(self, job: Paced, sign: int, now: float) -> None:
        """The others' progress until now counts at the old speeds."""
        self._advance(now)
        was_short = self._is_short()
        (self._running.add if sign > 0 else self._running.discard)(job)
        for resource, share in job.shares.items():
            self._load[resource] += sign * share
        # Whoever was slowed may end earlier than it thinks.
        if sign < 0 and was_short:
            self._changed.notify_all()

    def _is_short(self) -> bool:
        return any(load > 1.0 + 1e-9 for load in self._load.values())

    def _advance(self, now: float) -> None:
        for job in self._running:
            job.remaining -= (now - job.since) * self._speed(job)
            job.since = now

    def _speed(self, job: Paced) -> float:
        return speed(job.shares, self._load)


class Paced:
    """An op under way: what it takes alone, how much of that is left, when it began and ended."""

    def __init__(self, seconds: float, shares: dict[str, float], started: float) -> None:
        self.seconds = seconds
        self.remaining = seconds
        self.shares = shares
        self.started = self.since = self.ended = started


def _sleep_precisely() -> None:
    """Linux wakes a thread up to 50 us late unless it asks for better (prctl(2))."""
    if not getattr(_is_precise, "done", False):
        _is_precise.done = True
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(_PR_SET_TIMERSLACK, 1)
