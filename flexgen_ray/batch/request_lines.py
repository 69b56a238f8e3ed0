"""Reads the request lines of a job: OpenAI Batch lines, and plain lines.

A Batch line is {"custom_id": ..., "method": "POST", "url": ..., "body": {...}}. A plain line is the
body alone, {"prompt": ...} or {"messages": [...]}, with columns of the user's own beside it. A line
that can't be answered becomes a `BatchLine` with its error, and never stops the others. Knows JSON
and the fields of requests; nothing of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import cast

from flexgen_ray.batch.request_fields import (
    CHAT,
    COMPLETION,
    PARAMS,
    refuse_fields,
    split_columns,
    used_fields,
)
from flexgen_ray.files.json_text import parse_object, refuse_surrogates
from flexgen_ray.request import DEFAULT_MAX_TOKENS, MAX_LOGPROBS, SamplingParams
from flexgen_ray.text.messages import ChatOptions, Messages, parse_messages

# The field of the body that holds the input of a request, by url.
_INPUT_FIELD = {COMPLETION: "prompt", CHAT: "messages"}
# OpenAI's paths and Azure's, which may name a deployment. Group 2 is "/chat" for chats.
_PATH = re.compile(r"(/v1|/openai/v1|/openai/deployments/[^/?]+)?(/chat)?/completions([?].*)?")
_LENGTHS = ("max_tokens", "max_completion_tokens")  # the older name and the newer
_LINE_KEYS = {"custom_id", "method", "url", "body"}
_MAX_MESSAGE_LEN = 1000  # characters of a line's error
MAX_ID_LEN = 1000  # characters of a custom_id
MAX_PROMPTS = 2048  # prompts in one line

# A string, an integer or a structural character of JSON; anything else in a damaged line is
# skipped.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?=\s*[,}])|[][{}:,]', re.DOTALL)

Prompt = str | list[int]


@dataclass(frozen=True)
class BatchLine:
    """One input line: a request with prompts or with a chat's messages, or the line's error.

    number: number of the line in the input, from 1.
    prompts: one or more prompts, which are answered together in one output line.
    messages, chat: the messages of a chat, and options for formatting them.
    params: sampling parameters; None for a line that can't be answered.
    error: why the line can't be answered.
    echo: return the prompt's text before the answer.
    limit: source of max_tokens: "line", "job" (--max-tokens or the model) or "default".
    columns: the user's own columns, which are copied to the output line.
    """

    custom_id: str
    number: int
    prompts: tuple[Prompt, ...] = ()
    messages: Messages | None = None
    chat: ChatOptions | None = None
    params: SamplingParams | None = None
    error: str | None = None
    echo: bool = False
    limit: str = "line"
    columns: dict = field(default_factory=dict)

    @property
    def prompt(self) -> Prompt | None:
        """The first prompt; None for a chat."""
        return self.prompts[0] if self.prompts else None


def read_lines(lines: Iterable[bytes], defaults: SamplingParams) -> Iterator[BatchLine]:
    """Yield a BatchLine for every line that isn't blank; a bad line never stops the others.

    Every BatchLine has a unique custom_id: the line's own, or `line-7` if line 7 has none or one
    that is invalid or taken. The custom_id is read before anything else, so that even a damaged
    line's error can be matched to its request.

    defaults: sampling parameters of lines that set none.
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
    """Read one line. taken: number of the line that has each custom_id so far."""
    custom_id = f"line-{number}"
    while custom_id in taken:
        custom_id += "+"
    line = BatchLine(custom_id, number)
    try:
        try:
            value = parse_object(raw)
        except ValueError:
            with suppress(ValueError):
                line = replace(line, custom_id=_custom_id(_find_custom_id(raw), custom_id, taken))
            raise
        line = replace(line, custom_id=_custom_id(value.get("custom_id"), custom_id, taken))
        if b"\\u" in raw:
            refuse_surrogates(value)
        url, body, columns = _parts(value)
        line = replace(line, columns=columns)
        refuse_fields(columns)
        return _with_request(line, used_fields(url, body), defaults)
    except ValueError as error:
        return replace(line, error=line_error(number, error))


def _with_request(line: BatchLine, body: dict, defaults: SamplingParams) -> BatchLine:
    """Return the line with the request in its body. body: the fields that affect the answer."""
    params, limit = _params(body, defaults)
    line = replace(line, limit=limit)
    if "messages" in body:
        messages = parse_messages(body["messages"])
        return replace(line, messages=messages, chat=_chat_options(body), params=params)
    prompts = _parse_prompts(body.get("prompt"))
    return replace(line, prompts=prompts, params=params, echo=_echo(body))


def line_error(number: int, error: ValueError) -> str:
    """Return a line's error message, cut at 1000 characters, since it may quote a long prompt."""
    message = f"line {number}: {error}"
    return message if len(message) <= _MAX_MESSAGE_LEN else f"{message[:_MAX_MESSAGE_LEN]}..."


def _custom_id(custom_id: object, default: str, taken: dict[str, int]) -> str:
    """Return the custom_id of the line's answer; an integer becomes a string of its digits.

    Raises ValueError if the custom_id is invalid or taken by an earlier line.
    """
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
            f"custom_id has {len(custom_id)} characters, but {MAX_ID_LEN} at most are allowed; "
            f"shorten it ({custom_id[:20]!r}...)"
        )
    refuse_surrogates(custom_id)
    if custom_id in taken:
        raise ValueError(f"custom_id {custom_id!r} is already used by line {taken[custom_id]}")
    return custom_id


def _find_custom_id(raw: bytes) -> object:
    """Return the custom_id of a line that isn't valid JSON, if it can be read; else None.

    Walks through the tokens of the damaged line and returns the value after `"custom_id":` in the
    outermost object; a custom_id within a body, say, is not the line's.
    """
    depth, before = 0, (b"", b"")  # open brackets; the last two tokens of the outermost object
    for match in _TOKEN.finditer(raw):
        token = match[0]
        if before == (b'"custom_id"', b":"):
            return _json_value(token)
        depth += (token in b"[{") - (token in b"]}")
        before = (before[1], token) if depth == 1 else (b"", b"")
    return None


def _json_value(token: bytes) -> object:
    try:
        return json.loads(token.decode("utf-8"))
    except ValueError:
        return None


def _parts(value: dict) -> tuple[str, dict, dict]:
    """Split a line into the url of its request, the fields of its body, and the user's columns.

    Fields that are null are left out, as if they were missing. A null max_tokens stays: it asks for
    as many tokens as the context leaves.
    """
    rest = {name: it for name, it in value.items() if name != "custom_id"}
    # A plain line may have a column named "body" with text in it: that alone is no Batch line.
    has_body = isinstance(value.get("body"), dict) or {"body", "url"} <= value.keys()
    if not has_body and (url := _url_by_input(value)):
        body, columns = split_columns(url, rest)
    elif "body" in value:
        columns = {name: it for name, it in rest.items() if name not in _LINE_KEYS}
        url, body = _url_and_body(value)
    elif "url" in value or "method" in value:
        raise ValueError("body is missing; it must hold the request")
    else:
        url, body, columns = COMPLETION, {}, rest
    body = {name: it for name, it in body.items() if it is not None or name in _LENGTHS}
    if body.get("logprobs") is False:  # a chat's way to ask for no log-probabilities
        del body["logprobs"]
    return url, body, _finite(columns)


def _url_by_input(fields: dict) -> str | None:
    """Return the url that takes this request by its input: prompt or messages; None for neither."""
    urls = [url for url, name in _INPUT_FIELD.items() if fields.get(name) is not None]
    if len(urls) > 1:
        raise ValueError("prompt and messages are both there; give one of them")
    return urls[0] if urls else None


def _url_and_body(value: dict) -> tuple[str, dict]:
    """Return the url, COMPLETION or CHAT, and the body of a Batch line."""
    body, url = value["body"], value.get("url")
    if isinstance(body, str):
        body = _body_in_a_string(body)
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object")
    path = _PATH.fullmatch(url) if isinstance(url, str) else None
    if value.get("method", "POST") != "POST" or (url is not None and path is None):
        raise ValueError(
            f"method and url are {value.get('method', 'POST')!r} and {url!r}; they must be POST "
            f"and {COMPLETION} or {CHAT}, or an Azure path that ends in the same way"
        )
    if path is None:
        return _url_by_input(body) or COMPLETION, body
    standard_url = CHAT if path[2] else COMPLETION
    if body.get(_INPUT_FIELD[standard_url]) is None:
        raise ValueError(f"{_INPUT_FIELD[standard_url]} is missing; {url} needs it")
    return standard_url, body


def _body_in_a_string(body: str) -> dict:
    """Parse a body that is JSON within a string, as tools of some servers write it."""
    try:
        value = parse_object(body.encode())
        refuse_surrogates(value)
        return value
    except ValueError as error:
        raise ValueError(
            f"body must be a JSON object, or a string that holds one: {error}"
        ) from error


def _finite(columns: dict) -> dict:
    """Return the columns with null in place of NaN and infinities, which JSON lacks."""
    return columns and json.loads(json.dumps(columns), parse_constant=lambda _: None)


def _params(body: dict, defaults: SamplingParams) -> tuple[SamplingParams, str]:
    """Return a line's sampling parameters, and the source of its max_tokens (`BatchLine.limit`)."""
    own = {name: body[name] for name in PARAMS if name in body}
    own["max_tokens"], limit = _max_tokens(body, defaults)
    if not isinstance(own.get("stop", []), str | list):
        raise ValueError(f"stop is {own['stop']!r}; it must be a string or a list of strings")
    if "messages" in body:
        own |= _chat_params(body)
    if _echo(body):
        own["prompt_logprobs"] = own.get("logprobs", defaults.logprobs)
    return replace(defaults, **own), limit


def _max_tokens(body: dict, defaults: SamplingParams) -> tuple[int | None, str]:
    """Return max_tokens and its source: the line's own value, the job's, or the default.

    As in OpenAI's API and vLLM, the default is 16 for prompts; for chats, and where the line has
    null, it is None: as many tokens as the context leaves.
    """
    asked = [(name, body[name]) for name in _LENGTHS if name in body]
    own = [pair for pair in asked if pair[1] is not None]
    if len(own) == 2 and own[0][1] != own[1][1]:
        both = " and ".join(f"{name} {most!r}" for name, most in own)
        raise ValueError(f"the line has {both}; give one of them")
    if own:
        return own[0][1], "line"
    if defaults.max_tokens is not None:
        return defaults.max_tokens, "job"
    return None if asked or "messages" in body else DEFAULT_MAX_TOKENS, "default"


def _echo(body: dict) -> bool:
    """Return whether the prompt is to be returned before the answer."""
    echo = body.get("echo", False)
    if not isinstance(echo, bool):
        raise ValueError(f"echo is {echo!r}; it must be true or false")
    return echo


def _chat_params(body: dict) -> dict:
    """Return the sampling parameter that a chat asks for by logprobs and top_logprobs."""
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


def _chat_options(body: dict) -> ChatOptions:
    """Return options for formatting a chat.

    reasoning_effort becomes a variable of the chat template; "none" also sets enable_thinking to
    False, which is the variable that Qwen 3's template reads.
    """
    choice, effort = body.get("tool_choice", "auto"), body.get("reasoning_effort")
    if choice not in ("auto", "none"):
        raise ValueError(
            f"tool_choice is {choice!r}; only 'auto' or 'none' is supported: a tool call can't be "
            "enforced"
        )
    options = ChatOptions(
        (body.get("tools") or None) if choice == "auto" else None,
        body.get("add_generation_prompt"),
        body.get("continue_final_message", False),
        body.get("chat_template_kwargs", {}),
    )
    if effort is None:
        return options
    if not isinstance(effort, str):
        raise ValueError(f"reasoning_effort is {effort!r}; it must be a string, such as 'low'")
    variables = {
        "reasoning_effort": effort,
        **({"enable_thinking": False} if effort == "none" else {}),
    }
    return replace(options, chat_template_kwargs=variables | options.chat_template_kwargs)


def _parse_prompts(prompt: object) -> tuple[Prompt, ...]:
    """Return a line's prompts, given as a text, a list of token ids, or a list of either."""
    if prompt is None:
        raise ValueError("prompt is missing, and so are messages; give one of them")
    if _is_prompt(prompt):
        return (cast(Prompt, prompt),)
    if not isinstance(prompt, list) or not prompt or not all(map(_is_prompt, prompt)):
        raise ValueError(
            "prompt must be a string or a list of token ids, or a list of such prompts"
        )
    if len(prompt) > MAX_PROMPTS:
        raise ValueError(
            f"the line has {len(prompt)} prompts, but {MAX_PROMPTS} at most are allowed; give each "
            "a line of its own"
        )
    return tuple(prompt)


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    )
