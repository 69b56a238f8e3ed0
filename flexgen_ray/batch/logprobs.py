"""The `logprobs` objects of OpenAI's completions and chats. Knows outputs; nothing of requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexgen_ray.request import CompletionOutput, Logprob, Logprobs, RequestOutput

LEAST = -9999.0  # stands for minus infinity, which JSON lacks
# Most characters between the texts of two tokens: spaces, or a character of several tokens.
SLACK = 4


@dataclass(frozen=True)
class Echo:
    """A prompt that is returned with its answer.

    text: the prompt's text. first_token: text of its first token, which has no log-probability,
    since nothing precedes it.
    """

    text: str
    first_token: str


def logprobs_object(
    output: RequestOutput, answer: CompletionOutput, text: str, echo: Echo | None
) -> dict | None:
    """Return the logprobs object of a completion; None if the request asks for none.

    Lists the prompt's tokens before the answer's if there is an echo.
    text: the text that these tokens make up; text_offset says where each begins in it.
    """
    if answer.logprobs is None:
        return None
    pairs = list(zip(answer.token_ids, answer.logprobs, strict=True))
    if echo is not None:
        assert output.prompt_logprobs is not None
        pairs = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)) + pairs
    first = echo.first_token if echo else ""
    tokens = [_name(token, logprobs[token]) if logprobs else first for token, logprobs in pairs]
    return {
        "tokens": tokens,
        "token_logprobs": [
            _value(logprobs[token]) if logprobs else None for token, logprobs in pairs
        ],
        "top_logprobs": [_top(logprobs) if logprobs else None for _, logprobs in pairs],
        "text_offset": list(_offsets(tokens, text)),
    }


def chat_logprobs(answer: CompletionOutput, top: int) -> dict | None:
    """Return the logprobs object of a chat's answer; None if the request asks for none.

    top: number of likeliest tokens to list for each token.
    """
    if answer.logprobs is None:
        return None
    content = []
    for token, logprobs in zip(answer.token_ids, answer.logprobs, strict=True):
        assert logprobs is not None
        by_rank = sorted(logprobs.items(), key=lambda pair: pair[1].rank)
        tops = [_entry(*pair) for pair in by_rank if pair[1].rank <= top]
        content.append(_entry(token, logprobs[token]) | {"top_logprobs": tops})
    return {"content": content, "refusal": None}


def _entry(token: int, logprob: Logprob) -> dict:
    """Return the entry of one token in a chat's logprobs object."""
    name = _name(token, logprob)
    # A part of a character has no text, and its bytes are not known here.
    utf8 = None if "\ufffd" in name else list(name.encode())
    return {"token": name, "logprob": _value(logprob), "bytes": utf8}


def _top(logprobs: Logprobs) -> dict[str, float]:
    """Return log-probabilities by token text. Among tokens with the same text the first counts.

    The first is the answer's own token, then they go by rank.
    """
    by_text: dict[str, float] = {}
    for token, logprob in logprobs.items():
        by_text.setdefault(_name(token, logprob), _value(logprob))
    return by_text


def _name(token: int, logprob: Logprob) -> str:
    """Return a token's text, or its id if there is no tokenizer."""
    return f"token_id:{token}" if logprob.decoded_token is None else logprob.decoded_token


def _value(logprob: Logprob) -> float:
    return max(logprob.logprob, LEAST)


def _offsets(tokens: list[str], text: str) -> Iterator[int]:
    """Yield the offset in the text at which each token begins.

    A token that isn't in the text, such as a special one, begins where the next one does.
    """
    at = 0
    for token in tokens:
        place = text.find(token, at, at + len(token) + SLACK)
        yield max(place, at)
        at = place + len(token) if place >= 0 else at
