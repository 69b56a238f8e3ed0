"""Perplexity of a long text under a model with a bounded context, by sliding windows.

The token-level definition of transformers' guide: each window scores the tokens that no window
before it scored, and its other tokens are their context. Knows tokens; they are scored elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flexgen_ray.evaluation.run import run_requests
from flexgen_ray.llm import LLM


@dataclass(frozen=True)
class Window:
    """A window of a text: tokens start to stop, of which those from `first` on are scored."""

    start: int
    first: int
    stop: int


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows that together score every token once, except the text's first.

    Every scored token has at least `context - stride` tokens before it, or all that the text has.
    Example: 5 tokens, context 4, stride 2: tokens 0 to 4 score 1, 2, 3; tokens 2 to 5 score 4.
    With a stride as long as the context, windows don't overlap and the first token of each isn't
    scored, since nothing precedes it.
    Raises ValueError for an impossible context or stride, or a text of one token.
    """
    if context < 2 or not 1 <= stride <= context:
        raise ValueError(
            f"context is {context} and stride {stride}; context must be at least 2, and stride 1 "
            "to context"
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


def describe(figures: dict[str, float]) -> str:
    """One line on what `measure` returned."""
    return (
        f"perplexity {figures['perplexity']:.4f} over {figures['tokens']:,} tokens "
        f"({figures['nll']:.4f} nats per token)"
    )


def measure(
    llm: LLM, text: str, context: int, stride: int, max_tokens: int | None, scored_in: str
) -> dict[str, float]:
    """Measure the perplexity of a text.

    context, stride: tokens of a window, and by which it moves. max_tokens: tokens of the text to
    use; None for all. scored_in: "prefill" or "decode", the kind of pass that scores.
    Returns {"perplexity": ..., "nll": mean negative log-likelihood in nats a token, "tokens":
    number of scored tokens}.
    """
    token_ids = llm.tokenizer.encode(text)[:max_tokens]
    in_decode = scored_in == "decode"
    requests = []
    for index, window in enumerate(windows(len(token_ids), context, stride)):
        tokens, first = token_ids[window.start : window.stop], window.first - window.start
        requests.append(llm.score_request(index, tokens, first, in_decode))
    logprobs = [it.logprob for output in run_requests(llm, requests) for it in output.scores]
    nll = -math.fsum(logprobs) / len(logprobs)
    perplexity = math.exp(nll) if nll < 700 else math.inf  # exp(710) overflows a float
    return {"perplexity": perplexity, "nll": nll, "tokens": len(logprobs)}
