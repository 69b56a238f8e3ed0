"""Requests and their outputs, in the words vLLM's users know. No tensors here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature 0 is greedy. With a `seed` the same prompt gives the same answer wherever it stands;
    without one the run's seed and the request's index decide.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop: object = self.stop
        if stop is None or isinstance(stop, str | list):
            strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
            object.__setattr__(self, "stop", strings)
        if not _is_number(self.max_tokens, int) or self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens!r}; it must be an integer from 1 up")
        if not _is_number(self.temperature, int | float) or not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is {self.temperature!r}; it must be 0 (greedy) to 2")
        if not _is_number(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1")
        if self.seed is not None and not _is_number(self.seed, int):
            raise ValueError(f"seed is {self.seed!r}; it must be an integer")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; it must be non-empty strings")


def _is_number(value: object, kind) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Request:
    """One prompt on its way through the engine; `index` is its place in the input.

    generated: tokens of its answer that are there already; it goes on from them.
    """

    index: int
    prompt_token_ids: list[int]
    params: SamplingParams
    generated: list[int] = field(default_factory=list)

    @property
    def max_seq_len(self) -> int:
        return len(self.prompt_token_ids) + self.params.max_tokens


@dataclass(frozen=True)
class CompletionOutput:
    """One answer; finish_reason is "stop" (end token or stop string) or "length"."""

    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """A request's prompt and answer, as vLLM names them."""

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """What a stage says of a request that is done: tokens, not text."""

    index: int
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Progress:
    """What a stage says after each pass: how far it is, and how long that pass took.

    tokens: (request, token) of each new one. note: no pass, but something that people want to know.
    """

    new_tokens: int = 0
    prefill_tokens: int = 0
    seconds: float = 0.0
    is_prefill: bool = False
    tokens: tuple[tuple[int, int], ...] = ()
    note: str = ""


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


def several_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, a text or a list of token ids, stands for a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(token, int) for token in prompts):
        return [cast(Sequence[int], prompts)]
    return cast(list[Prompt], list(prompts))


def check_prompt(token_ids: list[int], max_seq_len: int, vocab_size: int) -> None:
    """ValueError says why a model of this context and vocabulary can't answer it."""
    if not token_ids:
        raise ValueError("the prompt is empty; give at least one token")
    if len(token_ids) >= max_seq_len:
        raise ValueError(
            f"the prompt has {len(token_ids)} tokens, but the model's context is {max_seq_len} "
            "tokens, and one must be left for the answer; shorten the prompt"
        )
    wrong = [token for token in token_ids if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")
