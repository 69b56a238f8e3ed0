"""Requests that fit a model, or an error that says why not. Knows tokens and limits; no text."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from flexgen_ray.model_config import ModelConfig
from flexgen_ray.request import MAX_TOKENS_UNSET, Request, SamplingParams


def generation(
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
        scored = scoring(index, token_ids, 1, False, config, limit)
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


def scoring(
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
