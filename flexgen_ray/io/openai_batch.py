"""OpenAI Batch lines: requests in, responses out. Also takes plain `{"prompt": ...}` lines, and
`{"messages": ...}`.

Knows JSON; nothing of models. Every fault of a line becomes that line's error row.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace

from flexgen_ray.io.json_object import find_custom_id, parse_object, refuse_surrogates
from flexgen_ray.io.openai_logprobs import Echo, chat_logprobs, logprobs_object
from flexgen_ray.messages import Messages, parse_messages
from flexgen_ray.request import MAX_LOGPROBS, RequestOutput, SamplingParams

# Where requests go, and what a request there asks with.
_URLS = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}
_LINE_KEYS = {"custom_id", "method", "url", "body"}
_PARAMS = {it.name for it in fields(SamplingParams)} - {"prompt_logprobs"}
_OTHERS = {"model", "user", "echo", "max_completion_tokens", "top_logprobs"}
_BODY_KEYS = {*_OTHERS, *_URLS.values(), *_PARAMS}
# Fields with which only the usual can be asked for.
_ONLY = {
    "best_of": 1,
    "stream": False,
    "response_format": {"type": "text"},
}
_MAX_MESSAGE = 1000
MAX_ID_LEN = 1000  # characters of a custom_id

Prompt = str | list[int]


@dataclass(frozen=True)
class BatchLine:
    """One input line: what is asked, a prompt or a chat's messages, or what is wrong with it.

    echo: the prompt comes with the answer.
    """

    custom_id: str
    number: int
    prompt: Prompt | None = None
    messages: Messages | None = None
    params: SamplingParams | None = None
    error: str | None = None
    echo: bool = False


def read_lines(lines: Iterable[bytes], defaults: SamplingParams) -> Iterator[BatchLine]:
    """One BatchLine for every line that isn't blank; a bad line never stops the others.

    Each has a custom_id of its own: the line's, or `line-7` where line 7 has none, or one that
    can't be used. A line's custom_id is read before anything else that may be wrong with the line.
    """
    taken: dict[str, int] = {}
    for number, raw in enumerate(lines, start=1):
        if raw.strip():
            line = _read_line(number, raw, taken, defaults)
            taken[line.custom_id] = number
            yield line


def _read_line(
    number: int, raw: bytes, taken: dict[str, int], defaults: SamplingParams
) -> BatchLine:
    custom_id = f"line-{number}"
    while custom_id in taken:
        custom_id += "+"
    try:
        try:
            value = parse_object(raw)
        except ValueError:
            with suppress(ValueError):
                custom_id = _custom_id(find_custom_id(raw), custom_id, taken)
            raise
        custom_id = _custom_id(value.get("custom_id"), custom_id, taken)
        if b"\\u" in raw:
            refuse_surrogates(value)
        body = _body(value)
        prompt, messages = body.get("prompt"), body.get("messages")
        params = _params(body, defaults)
        if messages is not None:
            return BatchLine(custom_id, number, messages=parse_messages(messages), params=params)
        prompt = _parse_prompt(prompt)
        return BatchLine(custom_id, number, prompt, params=params, echo=_echo(body))
    except ValueError as error:
        return BatchLine(custom_id, number, error=line_error(number, error))


def line_error(number: int, error: ValueError) -> str:
    """What is said of a line; not all of it if it quotes a whole book."""
    message = f"line {number}: {error}"
    return message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."


def _custom_id(custom_id: object, default: str, taken: dict[str, int]) -> str:
    """The custom_id to answer with; an integer as its digits, for answers have strings there."""
    if custom_id is None:
        return default
    if isinstance(custom_id, int) and not isinstance(custom_id, bool):
        custom_id = str(custom_id)
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(
            f"custom_id is {custom_id!r}; it must be a non-empty string, or an integer"
        )
    if len(custom_id) > MAX_ID_LEN:
        raise ValueError(
            f"custom_id has {len(custom_id)} characters, of which {MAX_ID_LEN} are the most; "
            f"shorten it ({custom_id[:20]!r}...)"
        )
    refuse_surrogates(custom_id)
    if custom_id in taken:
        raise ValueError(f"custom_id {custom_id!r} is that of line {taken[custom_id]} already")
    return custom_id


def _body(value: dict) -> dict:
    """A line's fields but for those that are null, which say nothing."""
    if "body" not in value:
        return _known_fields({key: it for key, it in value.items() if key != "custom_id"})
    _refuse_unknown("field", value, _LINE_KEYS)
    body, url = value["body"], value.get("url")
    if isinstance(body, str):
        body = _body_in_a_string(body)
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object")
    if value.get("method", "POST") != "POST" or (url is not None and url not in list(_URLS)):
        raise ValueError(f"method and url must be POST and {' or '.join(_URLS)}")
    if url is not None and body.get(_URLS[url]) is None:
        raise ValueError(f"{_URLS[url]} is missing, which {url} asks with")
    return _known_fields(body)


def _body_in_a_string(body: str) -> dict:
    """As some servers' tools write it."""
    try:
        return parse_object(body.encode())
    except ValueError as error:
        raise ValueError(
            f"body must be a JSON object, or a string that holds one: {error}"
        ) from error


def _known_fields(body: dict) -> dict:
    """ValueError for what would be asked for in vain."""
    body = {key: field for key, field in body.items() if field is not None}
    if body.get("logprobs") is False:  # as chats say that nobody wants them
        del body["logprobs"]
    _refuse_unknown("body field", body, _BODY_KEYS | set(_ONLY))
    for key, only in _ONLY.items():
        if body.get(key, only) != only:
            raise ValueError(f"{key} is {body[key]!r}; only {only!r} is supported")
    for pair in (("prompt", "messages"), ("max_tokens", "max_completion_tokens")):
        if set(pair) <= set(body):
            raise ValueError(f"{' and '.join(pair)} are both there; give one of them")
    return body


def _params(body: dict, defaults: SamplingParams) -> SamplingParams:
    given = {name: body[name] for name in _PARAMS if name in body}
    if "max_completion_tokens" in body:
        given["max_tokens"] = body["max_completion_tokens"]
    if not isinstance(given.get("stop", []), str | list):
        raise ValueError(f"stop is {given['stop']!r}; it must be a string or a list of strings")
    if "messages" in body:
        given |= _chat_params(body)
    elif "top_logprobs" in body:
        raise ValueError("top_logprobs is a chat's; for a prompt give their number as logprobs")
    if _echo(body):
        given["prompt_logprobs"] = given.get("logprobs", defaults.logprobs)
    return replace(defaults, **given)


def _echo(body: dict) -> bool:
    echo = body.get("echo", False)
    if not isinstance(echo, bool):
        raise ValueError(f"echo is {echo!r}; it must be true or false")
    return echo


def _chat_params(body: dict) -> dict:
    """A chat asks for log-probabilities in two fields."""
    if body.get("echo"):
        raise ValueError(f"echo is {body['echo']!r}; it is supported for prompts, not for chats")
    asked, top = body.get("logprobs", False), body.get("top_logprobs", 0)
    if not isinstance(asked, bool):
        raise ValueError(
            f"logprobs is {asked!r}; for chats it must be true or false, and top_logprobs a number"
        )
    if type(top) is not int or not 0 <= top <= MAX_LOGPROBS:
        raise ValueError(f"top_logprobs is {top!r}; it must be an integer, 0 to {MAX_LOGPROBS}")
    if top and not asked:
        raise ValueError(f"top_logprobs is {top}, which needs logprobs true")
    return {"logprobs": top} if asked else {}


def _parse_prompt(prompt: object) -> Prompt:
    if prompt is None:
        raise ValueError("prompt is missing, and so are messages")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise ValueError("prompt must be a string or a list of token ids")


def _refuse_unknown(what: str, values: dict, known: set[str]) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{what} {unknown[0]!r} is not supported; supported are {', '.join(sorted(known))}"
        )


def response_row(
    custom_id: str,
    model: str,
    output: RequestOutput,
    is_chat: bool = False,
    echo: Echo | None = None,
    top: int = 0,
) -> dict:
    """The response line of one answered request (usage counts the end token as generated).

    echo: the prompt, if its text is to come before the answer's. top: the likeliest tokens that
    are told of each of a chat's, if it asked for log-probabilities.
    """
    choices = []
    for answer in output.outputs:
        if is_chat:
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            told: dict = {"message": message, "logprobs": chat_logprobs(answer, top)}
        else:
            text = (echo.text if echo else "") + answer.text
            told = {"text": text, "logprobs": logprobs_object(output, answer, text, echo)}
        choices.append({"index": answer.index, **told, "finish_reason": answer.finish_reason})
    prompt_tokens = len(output.prompt_token_ids)
    new_tokens = sum(len(answer.token_ids) for answer in output.outputs)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }
    return _row(custom_id, 200, body)


def error_row(custom_id: str, message: str) -> dict:
    """The response line of a request that can't be answered, as OpenAI writes it."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return _row(custom_id, 400, {"error": error})


def _row(custom_id: str, status_code: int, body: dict) -> dict:
    response = {"status_code": status_code, "request_id": f"req-{uuid.uuid4().hex}", "body": body}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


def refusal(row: dict) -> str | None:
    """What an output line says instead of an answer, if it does.

    A body may be an object, or, as some servers write it, a string that holds one.
    """
    response, error = row.get("response") or {}, row.get("error")
    if error is None and response.get("status_code") == 200:
        return None
    body = response.get("body")
    if isinstance(body, str):
        body = parse_object(body.encode())
    error = error or (body or {}).get("error") or {}
    return str(error.get("message", "no reason is given"))
