"""Perplexity of a long text under a model with a bounded context, by sliding windows.

The token-level definition of transformers' guide: each window scores the tokens that the one before
it didn't, after all others of its own. Knows tokens; not how they are scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flexgen_ray.evaluation.run import run_requests
from flexgen_ray.llm import LLM


@dataclass(frozen=True)
class Window:
    """Tokens start to stop of a text, of which those from `first` on are scored."""

    start: int
    first: int
    stop: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Every token but the text's first is scored once, with `context - stride` tokens before it at
    least; with a stride as long as the context each window's first isn't scored.

    ValueError for a context or stride that can't be, or a text of one token.
    """
    if context < 2 or not 1 <= stride <= context:
        raise ValueError(
            f"context is {context} and stride {stride}; a window has 2 tokens or more, and the "
            "stride is 1 to the context"
        )
    if num_tokens < 2:
        raise ValueError(f"the text has {num_tokens} tokens; a token is scored after another one")
    stop = 0
    for start in range(0, num_tokens, stride):
        first, stop = max(stop, start + 1), min(start + context, num_tokens)
        if first < stop:
            yield Window(start, first, stop)
        if stop == num_tokens:
            return


def measure(
    llm: LLM, text: str, context: int, stride: int, max_tokens: int | None, scored_in: str
) -> dict[str, float]:
    """{"perplexity", "nll": nats a token, "tokens": as were scored}."""
    token_ids = llm.tokenizer.encode(text)[:max_tokens]
    in_decode = scored_in == "decode"
    requests = [
        llm.score_request(i, token_ids[it.start : it.stop], it.first - it.start, in_decode)
        for i, it in enumerate(windows(len(token_ids), context, stride))
    ]
    logprobs = [it.logprob for output in run_requests(llm, requests) for it in output.scores]
    nll = -math.fsum(logprobs) / len(logprobs)
    perplexity = math.exp(nll) if nll < 700 else math.inf  # a float ends there
    return {"perplexity": perplexity, "nll": nll, "tokens": len(logprobs)}
