"""Input and output processing: token ids to checked requests, finished requests to text.

On the way in, `generation_request` and `scoring_request` check a prompt's token ids and parameters
against the model, and cut max_tokens to what its context leaves. `Samples` then makes one request a
sample where several answers (`n`) are asked for; the engine knows single answers only.

On the way out, `Samples.take` turns each finished request into text and log-probabilities, and puts
the answers to one request together again. Knows tokens, text and limits; no engine, no tensors.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, count

from flexgen_ray.models.config import ModelConfig
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
from flexgen_ray.text.stop_strings import StopStrings
from flexgen_ray.text.tokenizer import Tokenizer


def request_output(request: Request, finished: Finished, tokenizer: Tokenizer) -> RequestOutput:
    """Output of a finished request: its answer's text, and log-probabilities if asked for.

    Forced tokens count as part of the prompt; the answer begins after them.
    """
    params, prompt = request.params, request.prompt_token_ids + request.forced_token_ids
    if finished.error is not None:
        return RequestOutput(request.index, None, prompt, error=finished.error)
    answer = finished.token_ids[len(request.forced_token_ids) :]
    token_ids, begin = prompt + answer, len(prompt)
    text = _text(token_ids, begin, finished, params, tokenizer) if tokenizer.exists else ""
    # Tokens before the first score have none.
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
    """Text of the answer, which begins at token `begin`.

    It ends before the stop string or stop token, or after it with include_stop_str_in_output.
    """
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
    """Logprobs of each token from `first` on: the token itself, then the `top` likeliest.

    top: None returns None, for a request that asks for no log-probabilities.
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
    """Logprobs of one token, whose text is `text`.

    names: {token: text} of the likeliest other tokens.
    """
    described = {token: Logprob(score.logprob, score.rank, text)}
    for rank, (other, logprob) in enumerate(score.top[:top], start=1):
        described.setdefault(other, Logprob(logprob, rank, names.get(other)))
    return described


class Samples:
    """Requests with one answer each, made of requests with `n` answers; and the way back.

    requests: requests for the engine. The first sample of a request keeps its index; the others get
    unused indices. Every sample draws its own random numbers, which depend only on the request and
    the sample's place. Example: requests 0 (n=1) and 1 (n=3) become 0, 1, 2 and 3, of which 2 and 3
    are further samples of request 1.
    """

    def __init__(self, requests: list[Request]) -> None:
        self.requests: list[Request] = []
        self._limits = {
            request.index: request.limit for request in requests if not request.forced_token_ids
        }
        self._unfinished: dict[int, tuple[Request, int]] = {}  # by a sample's index
        self._finished: dict[int, dict[int, RequestOutput]] = {}  # by a request's index, and sample
        unused = count(1 + max((request.index for request in requests), default=0))
        for request in requests:
            for sample in range(request.params.n):
                one = _sample_request(request, sample, next(unused)) if sample else request
                self.requests.append(one)
                self._unfinished[one.index] = request, sample

    @property
    def num_unanswered(self) -> int:
        """Number of samples that have not finished."""
        return len(self._unfinished)

    def cut(self, output: RequestOutput) -> list[str]:
        """Name of the limit (Request.limit) for each answer of the output that reached it."""
        cuts = [answer.finish_reason == "length" for answer in output.outputs]
        return [self._limits[output.index]] * sum(cuts) if output.index in self._limits else []

    def take(self, finished: Finished, tokenizer: Tokenizer) -> RequestOutput | None:
        """Take one finished sample; returns the request's output with its last sample, else None.

        Answers are in the order of the samples. If a sample failed, the output is that sample's,
        without answers.
        """
        request, sample = self._unfinished.pop(finished.index)
        samples = self._finished.setdefault(request.index, {})
        samples[sample] = request_output(request, finished, tokenizer)
        if len(samples) < request.params.n:
            return None
        del self._finished[request.index]
        outputs = [samples[number] for number in range(request.params.n)]
        failed = next((output for output in outputs if output.error), None)
        if failed is not None:
            return failed
        answers = [replace(output.outputs[0], index=i) for i, output in enumerate(outputs)]
        return replace(outputs[0], outputs=answers)


def _sample_request(request: Request, sample: int, index: int) -> Request:
    """Request for a further answer; only the first sample has the prompt's scores."""
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
    """Make a request for an answer, cut to the tokens that `limit` leaves it.

    index: place of the prompt in its call. limit: tokens that prompt and answer may have together.
    bad_words: token ids of the bad words of `params`.
    With max_tokens=None the answer may fill the context; with 0 the prompt is scored instead.
    Raises ValueError for a prompt that doesn't fit, and for tokens outside the vocabulary.
    """
    if not token_ids:
        raise ValueError("the prompt is empty; give at least one token")
    if params.max_tokens == 0:
        scored = scoring_request(index, token_ids, 1, False, config, limit)
        one = replace(params, max_tokens=1, temperature=0.0)
        return replace(scored, params=one, top=params.prompt_logprobs or 0)
    if len(token_ids) >= limit:
        raise ValueError(
            f"the prompt has {len(token_ids)} tokens, but {_describe_limit(limit, config)}, and "
            "one must be left for the answer; shorten the prompt"
        )
    _check_vocabulary([*token_ids, *params.stop_token_ids], config)
    _check_ends(params, config)
    if params.allowed_token_ids or params.logit_bias or bad_words:
        named = [*(params.allowed_token_ids or ()), *(params.logit_bias or ()), *chain(*bad_words)]
        _check_vocabulary(named, config)
        _check_choice(params, bad_words, config)
    first = 1 if params.prompt_logprobs is not None else len(token_ids)
    tops = [top for top in (params.logprobs, params.prompt_logprobs) if top is not None]
    wanted, left = params.max_tokens, limit - len(token_ids)
    fills_context = wanted is None or wanted > left
    most = left if wanted is None else min(wanted, left)
    return Request(
        index,
        token_ids,
        replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most)),
        scored_from=first if tops else None,
        top=max(tops, default=0),
        limit="context" if fills_context else "max_tokens",
        bad_words=bad_words,
        is_open=wanted is None,
    )


def scoring_request(
    index: int, token_ids: list[int], first: int, in_decode: bool, config: ModelConfig, limit: int
) -> Request:
    """Make a request that scores the tokens from place `first` on.

    limit: tokens that may precede the last one. in_decode: force all scored tokens one by one, as
    if they were generated; False prefills all but the last, which is always forced: a forced token
    that ends its request needs no pass of its own.
    Raises ValueError for more tokens than fit, and if none is left to score.
    """
    count = len(token_ids)
    if count > limit + 1:
        raise ValueError(
            f"{count} tokens are to be scored with what precedes them, but "
            f"{_describe_limit(limit, config)}, in which the last needs no place; give them in "
            "windows"
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


def _describe_limit(limit: int, config: ModelConfig) -> str:
    """Clause for an error: the limit on a request's tokens, and where it comes from."""
    if limit < config.max_seq_len:
        return f"max_model_len is {limit} tokens (the model's context is {config.max_seq_len})"
    return f"the model's context is {limit} tokens"


def _check_ends(params: SamplingParams, config: ModelConfig) -> None:
    """Raise ValueError if every token ends the answer, so none may come before min_tokens."""
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
    """Raise ValueError if no token could be chosen at some place of the answer.

    Example: with allowed_token_ids (5, 6) and bad words (6,) and (5, 5), nothing is left after a 5.
    """
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else config.eos_token_ids)}
    allowed = params.allowed_token_ids or range(config.vocab_size)
    never = {word[0] for word in bad_words if len(word) == 1}
    never |= ends if params.min_tokens else set()
    if len(allowed) > len(never.union(word[-1] for word in bad_words)):
        return
    left = set(allowed) - never
    # The last tokens of the answer decide which bad words the next token would complete. Only
    # beginnings of bad words matter, and () stands for any others.
    for last in {(), *(word[:-1] for word in bad_words if left.issuperset(word[:-1]))}:
        begun = (word for word in bad_words if last[len(last) + 1 - len(word) :] == word[:-1])
        if left.issubset(word[-1] for word in begun if len(word) <= len(last) + 1):
            raise ValueError(
                "allowed_token_ids, bad_words and min_tokens leave no token to choose"
                f"{f' after {list(last)}' if last else ''}; allow more"
            )


def _check_vocabulary(token_ids: list[int], config: ModelConfig) -> None:
    """Raise ValueError for the first token id that the model doesn't have."""
    if min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
        wrong = next(token for token in token_ids if not 0 <= token < config.vocab_size)
        raise ValueError(f"token id {wrong} is outside the vocabulary of {config.vocab_size}")
