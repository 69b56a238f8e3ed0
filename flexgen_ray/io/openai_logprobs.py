"""The `logprobs` object of OpenAI's completions. Knows outputs; no request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexgen_ray.request import Logprob, Logprobs, RequestOutput

LEAST = -9999.0  # JSON has no infinity
SLACK = 4  # characters of a text between two tokens' own: spaces, or one made of several tokens


@dataclass(frozen=True)
class Echo:
    """A prompt that comes with its answer: its text, and that of its first token, which nothing
    precedes and so has no score."""

    text: str
    first_token: str


def logprobs_object(output: RequestOutput, text: str, echo: Echo | None) -> dict | None:
    """Of the answer's tokens, after the prompt's if there is an echo; None if nobody asked.

    text: what the tokens make up; text_offset is where each begins in it.
    """
    (answer,) = output.outputs
    if answer.logprobs is None:
        return None
    told = list(zip(answer.token_ids, answer.logprobs, strict=True))
    if echo is not None:
        assert output.prompt_logprobs is not None
        told = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)) + told
    first = echo.first_token if echo else ""
    tokens = [_name(token, found[token]) if found else first for token, found in told]
    return {
        "tokens": tokens,
        "token_logprobs": [_value(found[token]) if found else None for token, found in told],
        "top_logprobs": [_top(found) if found else None for _, found in told],
        "text_offset": list(_offsets(tokens, text)),
    }


def _top(found: Logprobs) -> dict[str, float]:
    """Of tokens with the same text, the one that stands there or else the likeliest."""
    named: dict[str, float] = {}
    for token, it in found.items():
        named.setdefault(_name(token, it), _value(it))
    return named


def _name(token: int, found: Logprob) -> str:
    return f"token_id:{token}" if found.decoded_token is None else found.decoded_token


def _value(found: Logprob) -> float:
    return max(found.logprob, LEAST)


def _offsets(tokens: list[str], text: str) -> Iterator[int]:
    """A token that isn't in the text, such as a special one, begins where the next one does."""
    at = 0
    for token in tokens:
        place = text.find(token, at, at + len(token) + SLACK)
        yield max(place, at)
        at = place + len(token) if place >= 0 else at
