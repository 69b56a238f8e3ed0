"""News of a run while it goes on: passes, phases, notes, and stages that were replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flexgen_ray.request import Score


@dataclass(frozen=True)
class RunCounts:
    """How far a run is. most_tokens: of prompts and answers, if no answer ended early from here on.
    seconds_left: an estimate; None while nothing is known."""

    requests_done: int
    num_requests: int
    prompt_tokens: int
    new_tokens: int
    most_tokens: int
    tokens_per_s: float
    seconds_left: float | None

    @property
    def tokens(self) -> int:
        """Prompt tokens and new ones that are done."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Progress:
    """A pass of a stage, with its duration; or something else that takes time or is worth a line.

    tokens: (request, token) of each new one; scores: (request, scores), of tokens in `tokens` or
    before. standing: how far the run is with this pass.
    phase: no pass, but work of this name, such as "loading weights": `done` of `total` `unit` (0 of
    0 where that is unknown); detail: the part that is under way.
    note: neither, but a line for people.
    """

    new_tokens: int = 0
    prefill_tokens: int = 0
    seconds: float = 0.0
    is_prefill: bool = False
    tokens: tuple[tuple[int, int], ...] = ()
    note: str = ""
    scores: tuple[tuple[int, list[Score]], ...] = ()
    standing: RunCounts | None = None
    phase: str = ""
    done: float = 0
    total: float = 0
    unit: str = ""
    detail: str = ""

    @property
    def current_phase(self) -> str:
        """Name of the work; a pass is prefill or decode."""
        return self.phase or ("prefill" if self.is_prefill else "decode")


@dataclass
class Recovery:
    """Stages that were lost and replaced, and how many seconds each part of that took.

    detected_at: time.time() when it was known. prefill: until the first new token.
    """

    reason: str
    stages: list[int]
    detected_at: float = field(default_factory=time.time)
    restart_seconds: float = 0.0
    weights_seconds: float = 0.0
    prefill_seconds: float = 0.0

    def note_restart(self) -> None:
        """The processes are there."""
        self.restart_seconds = time.time() - self.detected_at

    def note_weights(self) -> None:
        """Their weights are loaded."""
        self.weights_seconds = time.time() - self.detected_at - self.restart_seconds

    def note_tokens(self) -> None:
        """A token came; the first counts."""
        before = self.restart_seconds + self.weights_seconds
        self.prefill_seconds = self.prefill_seconds or time.time() - self.detected_at - before

    def line(self) -> str:
        """For people; the first tokens are told when they are there."""
        parts = {"restart": self.restart_seconds, "weights": self.weights_seconds}
        parts |= {"prefill": self.prefill_seconds} if self.prefill_seconds else {}
        seconds = ", ".join(f"{part} {it:.1f} s" for part, it in parts.items())
        which = ", ".join(map(str, self.stages))
        return f"stage {which} replaced ({self.reason}): {seconds}"


OnProgress = Callable[[Progress], None]


def ignore_progress(event: Progress) -> None:
    """Shows nothing."""
