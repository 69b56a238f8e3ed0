"""Events of a run while it goes on: passes, phases, notes, and replaced stages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flexgen_ray.request import Score


@dataclass(frozen=True)
class RunCounts:
    """Progress of a run in numbers.

    most_tokens: tokens of all prompts and answers if no further answer ends early; those of answers
        without max_tokens are expected (is_bound is False), and there may be more.
    seconds_left: an estimate; None while nothing is known.
    """

    requests_done: int
    num_requests: int
    prompt_tokens: int
    new_tokens: int
    most_tokens: int
    tokens_per_s: float
    seconds_left: float | None
    is_bound: bool = True

    @property
    def tokens(self) -> int:
        """Prompt tokens and new tokens that are done; of prompts, also those that are shared."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Progress:
    """One event: a pass of a stage, a phase of other work, or a note.

    Fields of a pass: new_tokens, prefill_tokens, seconds, is_prefill; saved_tokens: of prompts,
    done without being computed with each (layout.rows.Rows); tokens: (request, token) of each new
    token; scores: (request, scores) of these tokens or earlier ones; standing: progress of the run.
    Fields of a phase: phase: its name, such as "loading weights"; done, total, unit: amount of
    work, 0 of 0 if unknown; detail: the part under way.
    Field of a note: note: one line for people.
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
    saved_tokens: int = 0

    @property
    def current_phase(self) -> str:
        """Name of the phase; a pass is in the phase prefill or decode."""
        return self.phase or ("prefill" if self.is_prefill else "decode")


@dataclass
class Recovery:
    """Replacement of lost stages, with the seconds that each part of it took.

    detected_at: time.time() when the loss was detected; restart_seconds: until the processes ran;
    weights_seconds: until weights were loaded; prefill_seconds: until the first new token.
    """

    reason: str
    stages: list[int]
    detected_at: float = field(default_factory=time.time)
    restart_seconds: float = 0.0
    weights_seconds: float = 0.0
    prefill_seconds: float = 0.0

    def note_restart(self) -> None:
        """Note that the new processes run."""
        self.restart_seconds = time.time() - self.detected_at

    def note_weights(self) -> None:
        """Note that their weights are loaded."""
        self.weights_seconds = time.time() - self.detected_at - self.restart_seconds

    def note_tokens(self) -> None:
        """Note that a token was generated; only the first one counts."""
        before = self.restart_seconds + self.weights_seconds
        self.prefill_seconds = self.prefill_seconds or time.time() - self.detected_at - before

    def line(self) -> str:
        """One line for people; the prefill is left out while it goes on."""
        parts = {"restart": self.restart_seconds, "weights": self.weights_seconds}
        parts |= {"prefill": self.prefill_seconds} if self.prefill_seconds else {}
        seconds = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())
        which = ", ".join(map(str, self.stages))
        return f"stage {which} replaced ({self.reason}): {seconds}"


OnProgress = Callable[[Progress], None]


def ignore_progress(event: Progress) -> None:
    """Callback that ignores an event."""
