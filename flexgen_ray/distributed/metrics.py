"""Metrics of stages, which Ray's nodes export to Prometheus (prefix `ray_`).

Knows lanes' busy seconds and numbers of tokens, which a thread of its own publishes, so that no
token waits for a metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from threading import Event, Thread

from ray.util.metrics import Counter, Gauge

UPDATE_SECONDS = 2.0


class StageMetrics:
    """Metrics of one stage during one run, as a context manager.

    Utilization and tokens/s cover the last few seconds, bubbles the whole run.
    stage: the stage's number. busy: returns {lane: seconds at work so far}.
    """

    def __init__(self, stage: int, busy: Callable[[], dict[str, float]]) -> None:
        self._tags = {"stage": str(stage)}
        self._busy = busy
        self._num_tokens = 0
        keys = ("stage",)
        self._tokens = Counter("flexgen_ray_tokens", "New tokens that passed the stage.", keys)
        self._rate = Gauge("flexgen_ray_tokens_per_s", "New tokens a second.", keys)
        self._utilization = Gauge(
            "flexgen_ray_lane_utilisation", "Share of time that a lane is at work.", (*keys, "lane")
        )
        self._bubbles = Gauge(
            "flexgen_ray_bubbles", "Share of the run in which the device's lane idled.", keys
        )
        self._stopped = Event()
        self._thread = Thread(target=self._update_until_stopped, daemon=True, name="metrics")

    def count_tokens(self, count: int) -> None:
        """Add the new tokens of a pass."""
        self._num_tokens += count

    def __enter__(self) -> StageMetrics:
        self._began = self._last = time.monotonic()
        self._last_tokens, self._last_busy = 0, dict[str, float]()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _update_until_stopped(self) -> None:
        while not self._stopped.wait(UPDATE_SECONDS):
            self._update()
        self._update()

    def _update(self) -> None:
        now, tokens, busy = time.monotonic(), self._num_tokens, self._busy()
        seconds = max(now - self._last, 1e-9)
        new = tokens - self._last_tokens
        if new:
            self._tokens.inc(new, self._tags)
        self._rate.set(new / seconds, self._tags)
        for lane, total in busy.items():
            # An op counts when it ends, and may have begun before the last update.
            share = min((total - self._last_busy.get(lane, 0.0)) / seconds, 1.0)
            self._utilization.set(share, self._tags | {"lane": lane})
        idle = 1 - busy.get("device", 0.0) / max(now - self._began, 1e-9)
        self._bubbles.set(max(idle, 0.0), self._tags)
        self._last, self._last_tokens, self._last_busy = now, tokens, busy


def count_restarts(stages: Iterable[int]) -> None:
    """Count a restart of each of these stages."""
    restarts = Counter("flexgen_ray_restarts", "Times a lost stage was replaced.", ("stage",))
    for stage in stages:
        restarts.inc(1, {"stage": str(stage)})
