"""When each request of a run arrived, had its first token and was finished."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from flexgen_ray.events import Progress
from flexgen_ray.request import Request, RequestMetrics, RequestOutput


class RequestTimes:
    """Times of one run's requests; several answers to a request are one request."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._arrival = time.time()
        self._first_token: dict[int, float] = {}
        self._owner = {it.index: it.index if it.first is None else it.first for it in requests}

    def note(self, progress: Progress) -> None:
        """The first tokens of a pass are there now."""
        now = time.time()
        for index, _ in progress.tokens:
            self._first_token.setdefault(self._owner[index], now)

    def finish(self, output: RequestOutput) -> RequestOutput:
        """The output of a request that is finished now, with its times."""
        now = time.time()
        # An answer of one token is there before the news of its pass.
        made = now if any(answer.token_ids for answer in output.outputs) else None
        first = self._first_token.pop(output.index, made)
        return replace(output, metrics=RequestMetrics(self._arrival, first, now))
