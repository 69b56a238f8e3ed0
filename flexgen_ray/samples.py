"""Several answers to a request: the engine gets a request for each, and knows nothing of it.

Every sample draws from a stream of its own, which depends on the request and the sample's place
alone. Knows requests and outputs; no engine.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from flexgen_ray.outputs import request_output
from flexgen_ray.request import Finished, Request, RequestOutput
from flexgen_ray.tokenizer import Tokenizer


class Samples:
    """`requests` are what the engine is given; first samples keep their request's index."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests: list[Request] = []
        self._limits = {request.index: request.limit for request in requests if not request.given}
        self._asked: dict[int, tuple[Request, int]] = {}
        self._outputs: dict[int, dict[int, RequestOutput]] = {}
        unused = count(1 + max((request.index for request in requests), default=0))
        for request in requests:
            for sample in range(request.params.n):
                one = request
                if sample:
                    one = _another(request, sample, next(unused))
                self.requests.append(one)
                self._asked[one.index] = request, sample

    @property
    def num_unanswered(self) -> int:
        """Samples that aren't there yet."""
        return len(self._asked)

    def cut(self, output: RequestOutput) -> list[str]:
        """Limits at which answers of the output were cut, one an answer that was."""
        cuts = [answer.finish_reason == "length" for answer in output.outputs]
        return [self._limits[output.index]] * sum(cuts) if output.index in self._limits else []

    def take(self, finished: Finished, tokenizer: Tokenizer) -> RequestOutput | None:
        """The request's output once all its samples are there, in their order; without answers if
        one of them failed."""
        request, sample = self._asked.pop(finished.index)
        found = self._outputs.setdefault(request.index, {})
        found[sample] = request_output(request, finished, tokenizer)
        if len(found) < request.params.n:
            return None
        del self._outputs[request.index]
        failed = next((found[it] for it in sorted(found) if found[it].error), None)
        if failed is not None:
            return failed
        answers = [replace(found[i].outputs[0], index=i) for i in range(request.params.n)]
        return replace(found[0], outputs=answers)


def _another(request: Request, sample: int, index: int) -> Request:
    """A request for another answer, without the prompt's scores, which the first one has."""
    first = request.index if request.first is None else request.first
    one = replace(request, index=index, sample=sample, first=first)
    if request.params.prompt_logprobs is None:
        return one
    top = request.params.logprobs
    scored_from = None if top is None else len(request.prompt_token_ids)
    return replace(one, scored_from=scored_from, top=top or 0)
