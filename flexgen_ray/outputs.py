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
)
from flexgen_ray.stops import StopStrings
from flexgen_ray.tokenizer import Tokenizer


def request_output(request: Request, finished: Finished, tokenizer: Tokenizer) -> RequestOutput:
    """Tokens that were given count as the prompt's, and only what came after them as the answer."""
    params, prompt = request.params, request.prompt_token_ids + request.given
    if finished.error is not None:
        return RequestOutput(request.index, None, prompt, error=finished.error)
    answer = finished.token_ids[len(request.given) :]
    token_ids, begin = prompt + answer, len(prompt)
    text = _text(token_ids, begin, finished, params, tokenizer) if tokenizer.exists else ""
    # Whatever precedes the first score has none.
    scores = [None] * (len(token_ids) - len(finished.scores)) + finished.scores
    of_answer = _logprobs(token_ids, scores, begin, params.logprobs, tokenizer)
    of_prompt = _logprobs(prompt, scores[:begin], 0, params.prompt_logprobs, tokenizer)
    stopped = finished.stop_reason
    output = CompletionOutput(text, answer, finished.finish_reason, of_answer, stop_reason=stopped)
    return RequestOutput(request.index, None, prompt, [output], of_prompt, finished.scores)


def _text(
    token_ids: list[int],
    begin: int,
    finished: Finished,
    params: SamplingParams,
    tokenizer: Tokenizer,
) -> str:
    """The answer, which begins at token `begin`, up to the stop string or the token that ended it,
    and with it if the request says so."""
    if finished.finish_reason == "stop" and not isinstance(finished.stop_reason, str):
        keeps = params.include_stop_str_in_output
        last = len(token_ids) - (not keeps)
        return tokenizer.text(token_ids, begin, last, params.skip_special_tokens)
    return StopStrings(tokenizer).text(token_ids, begin, params)


def _logprobs(
    token_ids: list[int],
    scores: list[Score | None],
    first: int,
    top: int | None,
    tokenizer: Tokenizer,
) -> list[Logprobs | None] | None:
    """Logprobs of each token from `first` on: itself first, then the `top` likeliest.

    None if nobody asked.
    """
    if top is None:
        return None
    texts = tokenizer.names(token_ids, first) if tokenizer.exists else [None] * len(token_ids)
    described: list[Logprobs | None] = []
    for place, (score, text) in enumerate(zip(scores[first:], texts, strict=False), start=first):
        names: dict[int, str] = {}
        if score is not None and tokenizer.exists:
            others = [other for other, _ in score.top[:top] if other != token_ids[place]]
            names = tokenizer.alternatives(token_ids, place, others)
        described.append(score and _described(token_ids[place], text, score, top, names))
    return described


def _described(
    token: int, text: str | None, score: Score, top: int, names: dict[int, str]
) -> Logprobs:
    """names: texts of the likeliest tokens but this one."""
    described = {token: Logprob(score.logprob, score.rank, text)}
    for rank, (other, logprob) in enumerate(score.top[:top], start=1):
        described.setdefault(other, Logprob(logprob, rank, names.get(other)))
    return described
