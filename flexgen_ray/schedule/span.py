"""An op with the time it ran: what is measured, emulated and simulated alike."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_ray.schedule.ops import Op


@dataclass(frozen=True, slots=True)
class Span:
    """One op as it ran; seconds since the run began."""

    op: Op
    start: float
    end: float
