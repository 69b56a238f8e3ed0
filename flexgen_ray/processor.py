"""Requests that fit a model, or an error that says why not. Knows tokens and limits; no text.

Several answers to a request: the engine gets a request for each, and knows nothing of it.

Every sample draws from a stream of its own, which depends on the request and the sample's place
alone. Knows requests and outputs; no engine.

What users get of a finished request: text up to its stop strings, and scores in vLLM's words.

Knows text and tokens; not how either came about.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, count

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.request import (
    MAX_TOKENS_UNSET,
    CompletionOutput,
    Finished,
    Logprob,
    Logprobs,
    Request,
    RequestOutput,
    SamplingParams,
    Score,
)
from flexgen_ray.text.stop_strings import StopStrings
from flexgen_ray.text.tokenizer import Tokenizer


def request_output(request: Request, finished: Finished, tokenizer: Tokenizer) -> RequestOutput:
    """Tokens that were given count as the prompt's, and only what came after them as the answer."""
    params, prompt = request.params, request.prompt_token_ids + request.forced_token_ids
    if finished.error is not None:
        return RequestOutput(request.index, None, prompt, error=finished.error)
    answer = finished.token_ids[len(request.forced_token_ids) :]
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
    texts = tokenizer.token_texts(token_ids, first) if tokenizer.exists else [None] * len(token_ids)
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


class Samples:
    """`requests` are what the engine is given; first samples keep their request's index."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests: list[Request] = []
        self._limits = {
            request.index: request.limit for request in requests if not request.forced_token_ids
        }
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


def generation_request(
    index: int,
    token_ids: list[int],
    params: SamplingParams,
    config: ModelConfig,
    limit: int,
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> Request:
    """A request for an answer, which ends where prompt and answer reach `limit` tokens.

    Without max_tokens it ends at 2,048 tokens at most; with 0 the prompt is scored. bad_words:
    token ids of those of the params. ValueError says why the prompt doesn't fit.
    """
    if not token_ids:
        raise ValueError("the prompt is empty; give at least one token")
    if params.max_tokens == 0:
        scored = scoring_request(index, token_ids, 1, False, config, limit)
        one = replace(params, max_tokens=1, temperature=0.0)
        return replace(scored, params=one, top=params.prompt_logprobs or 0)
    if len(token_ids) >= limit:
        raise ValueError(
            f"the prompt has {len(token_ids)} tokens, but {_named(limit, config)}, and one must be "
            "left for the answer; shorten the prompt"
        )
    _check_vocabulary([*token_ids, *params.stop_token_ids], config)
    _check_ends(params, config)
    if params.allowed_token_ids or params.logit_bias or bad_words:
        named = [*(params.allowed_token_ids or ()), *(params.logit_bias or ()), *chain(*bad_words)]
        _check_vocabulary(named, config)
        _check_choice(params, bad_words, config)
    first = 1 if params.prompt_logprobs is not None else len(token_ids)
    tops = [top for top in (params.logprobs, params.prompt_logprobs) if top is not None]
    asked, room = params.max_tokens or MAX_TOKENS_UNSET, limit - len(token_ids)
    limited_by = "default" if params.max_tokens is None else "max_tokens"
    limited_by = "context" if room < asked else limited_by
    most = min(asked, room)
    params = replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
    if not tops:
        return Request(index, token_ids, params, limit=limited_by, bad_words=bad_words)
    top = max(tops)
    return Request(index, token_ids, params, [], first, top, limit=limited_by, bad_words=bad_words)


def scoring_request(
    index: int, token_ids: list[int], first: int, in_decode: bool, config: ModelConfig, limit: int
) -> Request:
    """A request that scores tokens from `first` on, with `limit` tokens before the last at most.

    The last token, at least, is given rather than prefilled: it needs no pass of its own.
    """
    count = len(token_ids)
    if count > limit + 1:
        raise ValueError(
            f"{count} tokens are to be scored with what precedes them, but {_named(limit, config)}"
            ", in which the last needs no place; give them in windows"
        )
    if not 0 < first < count:
        raise ValueError(
            f"tokens from {first} on are to be scored, of {count}; the first is 1 or more, for "
            "nothing precedes token 0, and one must be left"
        )
    _check_vocabulary(token_ids, config)
    cut = first if in_decode else count - 1
    params = SamplingParams(max_tokens=count - cut, temperature=0.0)
    return Request(index, token_ids[:cut], params, token_ids[cut:], first)


def _named(limit: int, config: ModelConfig) -> str:
    if limit < config.max_seq_len:
        return f"max_model_len is {limit} tokens (the model's context is {config.max_seq_len})"
    return f"the model's context is {limit} tokens"


def _check_ends(params: SamplingParams, config: ModelConfig) -> None:
    """ValueError if before min_tokens no token could be chosen."""
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else config.eos_token_ids)}
    if params.min_tokens and ends.issuperset(range(config.vocab_size)):
        raise ValueError(
            f"min_tokens is {params.min_tokens}, but stop_token_ids and the model's end tokens are "
            f"all {config.vocab_size} of the vocabulary, and none of them may come before; stop at "
            "fewer, or give min_tokens 0"
        )


def _check_choice(
    params: SamplingParams, bad_words: tuple[tuple[int, ...], ...], config: ModelConfig
) -> None:
    """ValueError if at some place of the answer no token could be chosen."""
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else config.eos_token_ids)}
    allowed = params.allowed_token_ids or range(config.vocab_size)
    never = {word[0] for word in bad_words if len(word) == 1}
    never |= ends if params.min_tokens else set()
    if len(allowed) > len(never.union(word[-1] for word in bad_words)):
        return
    left = set(allowed) - never
    # What was said last decides which bad words are about to be completed.
    for said in {(), *(word[:-1] for word in bad_words if left.issuperset(word[:-1]))}:
        begun = (word for word in bad_words if said[len(said) + 1 - len(word) :] == word[:-1])
        if left.issubset(word[-1] for word in begun if len(word) <= len(said) + 1):
            raise ValueError(
                "allowed_token_ids, bad_words and min_tokens leave no token to choose"
                f"{f' after {list(said)}' if said else ''}; allow more"
            )


def _check_vocabulary(token_ids: list[int], config: ModelConfig) -> None:
    if min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
        wrong = next(token for token in token_ids if not 0 <= token < config.vocab_size)
        raise ValueError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")
