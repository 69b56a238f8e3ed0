"""Progress of a run, counted pass by pass: requests, tokens, time left, and each request's times.

Knows requests, and the prediction of a plan if there is one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from flexgen_ray.planner.pipeline_plan import PipelinePlan
from flexgen_ray.request import Finished, Request, RequestMetrics, RequestOutput
from flexgen_ray.runtime.events import OnProgress, Progress, RunCounts


class RequestTimes:
    """Arrival, first token and end of each request; several answers to one are one request."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._arrival = time.time()
        self._first_token: dict[int, float] = {}
        self._owner = {it.index: it.index if it.first is None else it.first for it in requests}

    def note(self, progress: Progress) -> None:
        """Note the time for requests whose first token came in this pass."""
        now = time.time()
        for index, _ in progress.tokens:
            self._first_token.setdefault(self._owner[index], now)

    def finish(self, output: RequestOutput) -> RequestOutput:
        """The output of a request that finishes now, with its times added."""
        now = time.time()
        # An answer of one token finishes before its pass is noted.
        made = now if any(answer.token_ids for answer in output.outputs) else None
        first = self._first_token.pop(output.index, made)
        return replace(output, metrics=RequestMetrics(self._arrival, first, now))


MIN_ANSWERS = 16  # finished answers from which their mean length predicts the others'
PRIOR = 0.02  # share of a run at which its own speed weighs as much as the predicted one


class ProgressTracker:
    """Counts the tokens and requests of one run; several answers to a request are one request.

    saved: prompt tokens that are expected not to be computed, because prompts share them. They take
    no time, but count as done when their requests begin.
    """

    def __init__(
        self, requests: Iterable[Request], plan: PipelinePlan | None = None, saved: int = 0
    ) -> None:
        self._to_save = saved
        self._pace = None if plan is None else _pace(plan)
        self._owner: dict[int, int] = {}
        self._most: dict[int, int] = {}
        self._unanswered: Counter[int] = Counter()
        self._prompt_left = self._new_left = 0
        self._is_bound = True
        for request in requests:
            owner = request.index if request.first is None else request.first
            self._owner[request.index] = owner
            self._unanswered[owner] += 1
            self._most[request.index] = request.expected_tokens
            self._is_bound &= not request.is_open
            self._prompt_left += len(request.prompt_token_ids)
            self._new_left += max(request.expected_tokens - len(request.generated), 0)
        self._num_requests = len(self._unanswered)
        self._prompt = self._computed = self._new = self._decoded = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._answers = self._answered = self._allowed = 0

    def follow(
        self, run: Iterable[Finished | Progress], *listeners: OnProgress
    ) -> Iterator[Finished]:
        """Yield finished answers; pass all other events, with counts added, to the listeners."""
        for listener in listeners:
            listener(Progress(is_prefill=True, standing=self.standing()))
        for event in run:
            if isinstance(event, Finished):
                self._finish(event)
                yield event
                continue
            if not event.note and not event.phase:
                self._add(event)
                event = replace(event, standing=self.standing())
            for listener in listeners:
                listener(event)

    def standing(self) -> RunCounts:
        """Counts of the run so far."""
        seconds = self._prefill_seconds + self._decode_seconds
        return RunCounts(
            self._num_requests - len(self._unanswered),
            self._num_requests,
            self._prompt,
            self._new,
            self._prompt + self._new + self._prompt_left + self._new_left,
            self._new / seconds if seconds else 0.0,
            self._seconds_left(),
            self._is_bound,
        )

    def _finish(self, finished: Finished) -> None:
        """Count a finished answer; the rest of what was expected of it no longer is."""
        most, length = self._most[finished.index], len(finished.token_ids)
        owner = self._owner[finished.index]
        self._unanswered[owner] -= 1
        if not self._unanswered[owner]:
            del self._unanswered[owner]
        self._answers += 1
        self._answered += length
        self._allowed += most
        self._new_left = max(self._new_left - (most - length), 0)

    def _add(self, event: Progress) -> None:
        prompt = event.prefill_tokens + event.saved_tokens
        self._prompt += prompt
        self._computed += event.prefill_tokens
        self._to_save -= event.saved_tokens
        self._new += event.new_tokens
        self._prompt_left = max(self._prompt_left - prompt, 0)
        self._new_left = max(self._new_left - event.new_tokens, 0)
        if event.is_prefill:
            self._prefill_seconds += event.seconds
        else:
            self._decode_seconds += event.seconds
            self._decoded += event.new_tokens

    def _seconds_left(self) -> float | None:
        """Estimated seconds until the run ends; None until there is something to estimate from."""
        prompt_left = max(self._prompt_left - max(self._to_save, 0), 0)
        new_left = self._new_left * self._used_share
        seconds = self._prefill_seconds + self._decode_seconds
        if self._pace is not None:
            prompt, new = self._pace
            done, left = prompt * self._computed + new * self._new, prompt * prompt_left
            left += new * new_left
            prior = PRIOR * (done + left)
            return left * (seconds + prior) / (done + prior) if left else 0.0
        if self._decoded:
            prompt = self._prefill_seconds / self._computed if self._computed else 0.0
            return prompt * prompt_left + self._decode_seconds / self._decoded * new_left
        if self._new:
            return seconds * (prompt_left + new_left) / (self._computed + self._new)
        return None

    @property
    def _used_share(self) -> float:
        """Finished answers' tokens per expected one; 1 until enough have finished."""
        if self._answers < MIN_ANSWERS or not self._allowed:
            return 1.0
        return self._answered / self._allowed


def _pace(plan: PipelinePlan) -> tuple[float, float]:
    """Predicted seconds for each prompt token and for each new one, as they divide a block's.

    Prompt tokens are those that are computed: of prefixes that prompts share, once for all.
    """
    job = plan.job
    of_block = plan.job_seconds / plan.block_seconds / job.num_requests
    computed = job.mean_prompt_len
    if job.sharing is not None:
        computed += job.sharing.tokens / job.num_requests
    prompt = of_block * plan.prefill_seconds / computed
    return prompt, of_block * plan.decode_seconds / job.mean_tokens
