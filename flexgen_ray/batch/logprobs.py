"""The `logprobs` objects of OpenAI's completions and chats. Knows outputs; no request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexgen_ray.request import CompletionOutput, Logprob, Logprobs, RequestOutput

LEAST = -9999.0  # JSON has no infinity
SLACK = 4  # characters of a text between two tokens' own: spaces, or one made of several tokens


@dataclass(frozen=True)
class Echo:
    """A prompt that comes with its answer: its text, and that of its first token, which nothing
    precedes and so has no score."""

    text: str
    first_token: str


def logprobs_object(
    output: RequestOutput, answer: CompletionOutput, text: str, echo: Echo | None
) -> dict | None:
    """Of one answer's tokens, after the prompt's if there is an echo; None if nobody asked.

    text: what the tokens make up; text_offset is where each begins in it.
    """
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


def chat_logprobs(answer: CompletionOutput, top: int) -> dict | None:
    """Of a chat's answer, with the `top` likeliest of each token; None if nobody asked."""
    if answer.logprobs is None:
        return None
    content = []
    for token, found in zip(answer.token_ids, answer.logprobs, strict=True):
        assert found is not None
        likeliest = sorted(found.items(), key=lambda pair: pair[1].rank)
        tops = [_told(*pair) for pair in likeliest if pair[1].rank <= top]
        content.append(_told(token, found[token]) | {"top_logprobs": tops})
    return {"content": content, "refusal": None}


def _told(token: int, it: Logprob) -> dict:
    name = _name(token, it)
    # A part of a character is no text, and which bytes it has is not known here.
    spelt = None if "\ufffd" in name else list(name.encode())
    return {"token": name, "logprob": _value(it), "bytes": spelt}


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
