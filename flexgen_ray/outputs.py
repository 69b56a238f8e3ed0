"""What users get of a finished request: text up to its stop strings, and scores in vLLM's words.

Knows text and tokens; not how either came about.
"""

from __future__ import annotations

from flexgen_ray.request import (
    CompletionOutput,
    Finished,
    Logprob,
    Logprobs,
    Request,
    RequestOutput,
    SamplingParams,
    Score,
    first_stop,
)
from flexgen_ray.tokenizer import Tokenizer


def request_output(request: Request, finished: Finished, tokenizer: Tokenizer) -> RequestOutput:
    """Tokens that were given count as the prompt's, and only what came after them as the answer."""
    params, prompt = request.params, request.prompt_token_ids + request.given
    answer = finished.token_ids[len(request.given) :]
    text = _text(answer, finished.finish_reason, params, tokenizer) if tokenizer.exists else ""
    # Whatever precedes the first score has none.
    unscored = len(prompt + answer) - len(finished.scores)
    scores = [None] * unscored + finished.scores
    told = _logprobs(answer, scores[len(prompt) :], params.logprobs, tokenizer)
    output = CompletionOutput(text, answer, finished.finish_reason, told)
    of_prompt = _logprobs(prompt, scores[: len(prompt)], params.prompt_logprobs, tokenizer)
    return RequestOutput(request.index, None, prompt, [output], of_prompt, finished.scores)


def _text(
    answer: list[int], finish_reason: str, params: SamplingParams, tokenizer: Tokenizer
) -> str:
    """Up to the stop string, or the stop token, that ended it, and with it if it is asked for."""
    keeps = params.include_stop_str_in_output
    if finish_reason == "stop" and answer[-1] in params.stop_token_ids:
        return tokenizer.decode(answer if keeps else answer[:-1])
    text = tokenizer.decode(answer)
    early = len(tokenizer.decode(answer[: params.min_tokens])) if params.min_tokens else 0
    found = first_stop(text, params.stop, early)
    return text if found is None else text[: found[keeps]]


def _logprobs(
    token_ids: list[int], scores: list[Score | None], top: int | None, tokenizer: Tokenizer
) -> list[Logprobs | None] | None:
    """Of each token: itself first, then the `top` likeliest; None if nobody asked."""
    if top is None:
        return None
    pairs = zip(token_ids, scores, strict=True)
    return [None if it is None else _described(token, it, top, tokenizer) for token, it in pairs]


def _described(token: int, score: Score, top: int, tokenizer: Tokenizer) -> Logprobs:
    found = {token: (score.logprob, score.rank)}
    for rank, (other, logprob) in enumerate(score.top[:top], start=1):
        found.setdefault(other, (logprob, rank))
    return {
        token: Logprob(logprob, rank, tokenizer.token(token) if tokenizer.exists else None)
        for token, (logprob, rank) in found.items()
    }
