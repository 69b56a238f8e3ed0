"""OpenAI Batch lines: requests in, responses out. Also takes plain `{"prompt": ...}` lines, and
`{"messages": ...}`.

Knows JSON; nothing of models. Every fault of a line becomes that line's error row.

JSON objects in lines, and the custom_id of a line that isn't one. Knows bytes and JSON.
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

# Strings, integers and what structures JSON; the rest of a damaged line is skipped.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?=\s*[,}])|[][{}:,]', re.DOTALL)


def find_custom_id(raw: bytes) -> object:
    """The custom_id of a line that can't be parsed, as far as it can be read; None without one."""
    depth, before = 0, (b"", b"")
    for match in _TOKEN.finditer(raw):
        token = match[0]
        if before == (b'"custom_id"', b":"):
            return _value(token)
        depth += (token in b"[{") - (token in b"]}")
        before = (before[1], token) if depth == 1 else (b"", b"")
    return None


def _value(token: bytes) -> object:
    try:
        return json.loads(token.decode("utf-8"))
    except ValueError:
        return None


# What a request to each url asks with.
_ASKS = {COMPLETION: "prompt", CHAT: "messages"}
# OpenAI's paths and Azure's, which may name a deployment.
_PATH = re.compile(r"(/v1|/openai/v1|/openai/deployments/[^/?]+)?(/chat)?/completions([?].*)?")
_LENGTHS = ("max_tokens", "max_completion_tokens")  # the older name and the newer
_LINE_KEYS = {"custom_id", "method", "url", "body"}
_MAX_MESSAGE = 1000
MAX_ID_LEN = 1000  # characters of a custom_id
MAX_PROMPTS = 2048  # of one line

Prompt = str | list[int]


@dataclass(frozen=True)
class BatchLine:
    """One input line: what is asked, prompts or a chat's messages, or what is wrong with it.

    prompts: one, or as many as one request may have, which are answered in one line. chat: how
    messages are formatted. echo: the prompt comes with the answer. limit: where its max_tokens come
    from: line, job or default. columns: what else the line has, for its output line.
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
    line = BatchLine(custom_id, number)
    try:
        try:
            value = parse_object(raw)
        except ValueError:
            with suppress(ValueError):
                line = replace(line, custom_id=_custom_id(find_custom_id(raw), custom_id, taken))
            raise
        line = replace(line, custom_id=_custom_id(value.get("custom_id"), custom_id, taken))
        if b"\\u" in raw:
            refuse_surrogates(value)
        url, body, columns = _parts(value)
        line = replace(line, columns=columns)
        refuse_fields(columns)
        return _asked(line, used_fields(url, body), defaults)
    except ValueError as error:
        return replace(line, error=line_error(number, error))


def _asked(line: BatchLine, body: dict, defaults: SamplingParams) -> BatchLine:
    """The line with what its body asks, of which only fields that change the answer are there."""
    params, limit = _params(body, defaults)
    line = replace(line, limit=limit)
    if "messages" in body:
        messages = parse_messages(body["messages"])
        return replace(line, messages=messages, chat=_chat_options(body), params=params)
    prompts = _parse_prompts(body.get("prompt"))
    return replace(line, prompts=prompts, params=params, echo=_echo(body))


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


def _parts(value: dict) -> tuple[str, dict, dict]:
    """A line's url, the fields of its body but for those that are null, which say nothing, and the
    columns beside them."""
    rest = {name: it for name, it in value.items() if name != "custom_id"}
    # A plain line may have columns of any name, a body that is a text too.
    has_body = isinstance(value.get("body"), dict) or {"body", "url"} <= value.keys()
    if not has_body and (url := _url_of(value)):
        body, columns = split_columns(url, rest)
    elif "body" in value:
        columns = {name: it for name, it in rest.items() if name not in _LINE_KEYS}
        url, body = _url_and_body(value)
    elif "url" in value or "method" in value:
        raise ValueError("body is missing, which holds what is asked")
    else:
        url, body, columns = COMPLETION, {}, rest
    body = {name: it for name, it in body.items() if it is not None or name in _LENGTHS}
    if body.get("logprobs") is False:  # as chats say that nobody wants them
        del body["logprobs"]
    return url, body, _finite(columns)


def _url_of(fields: dict) -> str | None:
    """Where a request with these fields goes, if they ask for anything."""
    found = [url for url, name in _ASKS.items() if fields.get(name) is not None]
    if len(found) > 1:
        raise ValueError("prompt and messages are both there; give one of them")
    return found[0] if found else None


def _url_and_body(value: dict) -> tuple[str, dict]:
    body, url = value["body"], value.get("url")
    if isinstance(body, str):
        body = _body_in_a_string(body)
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object")
    path = _PATH.fullmatch(url) if isinstance(url, str) else None
    if value.get("method", "POST") != "POST" or (url is not None and path is None):
        raise ValueError(
            f"method and url are {value.get('method', 'POST')!r} and {url!r}; they must be POST "
            f"and {COMPLETION} or {CHAT}, or Azure's of the same ends"
        )
    if path is None:
        return _url_of(body) or COMPLETION, body
    known = CHAT if path[2] else COMPLETION
    if body.get(_ASKS[known]) is None:
        raise ValueError(f"{_ASKS[known]} is missing, which {url} asks with")
    return known, body


def _body_in_a_string(body: str) -> dict:
    """As some servers' tools write it."""
    try:
        value = parse_object(body.encode())
        refuse_surrogates(value)
        return value
    except ValueError as error:
        raise ValueError(
            f"body must be a JSON object, or a string that holds one: {error}"
        ) from error


def _finite(columns: dict) -> dict:
    """NaN and infinities, which JSON hasn't, become null."""
    return columns and json.loads(json.dumps(columns), parse_constant=lambda _: None)


def _params(body: dict, defaults: SamplingParams) -> tuple[SamplingParams, str]:
    """The sampling parameters that the line asks for, and where its max_tokens come from."""
    given = {name: body[name] for name in PARAMS if name in body}
    given["max_tokens"], limit = _max_tokens(body, defaults)
    if not isinstance(given.get("stop", []), str | list):
        raise ValueError(f"stop is {given['stop']!r}; it must be a string or a list of strings")
    if "messages" in body:
        given |= _chat_params(body)
    if _echo(body):
        given["prompt_logprobs"] = given.get("logprobs", defaults.logprobs)
    return replace(defaults, **given), limit


def _max_tokens(body: dict, defaults: SamplingParams) -> tuple[int | None, str]:
    """The line's own, the job's or the default: 16, but what the context leaves for chats and
    lines with null, as OpenAI and vLLM have it."""
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
    echo = body.get("echo", False)
    if not isinstance(echo, bool):
        raise ValueError(f"echo is {echo!r}; it must be true or false")
    return echo


def _chat_params(body: dict) -> dict:
    """A chat asks for log-probabilities in two fields."""
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
    """reasoning_effort is a variable for the template; "none" also clears enable_thinking."""
    choice, effort = body.get("tool_choice", "auto"), body.get("reasoning_effort")
    if choice not in ("auto", "none"):
        raise ValueError(
            f"tool_choice is {choice!r}; only 'auto' or 'none' is supported: a call of a tool "
            "can't be enforced"
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
    """A text, a list of token ids, or a list of either."""
    if prompt is None:
        raise ValueError("prompt is missing, and so are messages")
    if _is_prompt(prompt):
        return (cast(Prompt, prompt),)
    if not isinstance(prompt, list) or not prompt or not all(map(_is_prompt, prompt)):
        raise ValueError("prompt must be a string or a list of token ids, or a list of those")
    if len(prompt) > MAX_PROMPTS:
        raise ValueError(
            f"{len(prompt)} prompts are in one line, of which {MAX_PROMPTS} are the most; give "
            "each a line of its own"
        )
    return tuple(prompt)


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    )
