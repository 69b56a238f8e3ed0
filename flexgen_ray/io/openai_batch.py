"""OpenAI Batch lines: requests in, responses out. Also takes plain `{"prompt": ...}` lines.

Knows JSON; nothing of models. Every fault of a line becomes that line's error row.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flexgen_ray.io.openai_logprobs import Echo, logprobs_object
from flexgen_ray.request import RequestOutput, SamplingParams

URL = "/v1/completions"
_LINE_KEYS = {"custom_id", "method", "url", "body"}
_PARAMS = ("max_tokens", "temperature", "top_p", "seed", "stop", "ignore_eos", "logprobs")
_BODY_KEYS = {"model", "prompt", "user", "echo", *_PARAMS}


@dataclass(frozen=True)
class BatchLine:
    """One input line: what is asked, or what is wrong with it. echo: the prompt comes with the
    answer."""

    custom_id: str
    prompt: str | list[int] | None = None
    params: SamplingParams | None = None
    error: str | None = None
    echo: bool = False


def read_lines(lines: Iterable[bytes], defaults: SamplingParams) -> Iterator[BatchLine]:
    """One BatchLine for every line that isn't blank; a bad line never stops the others."""
    seen: set[str] = set()
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        custom_id = f"line-{number}"
        try:
            value = _parse_object(raw)
            custom_id = _custom_id(value, custom_id)
            if custom_id in seen:
                raise ValueError(f"custom_id {custom_id!r} was used by an earlier line")
            seen.add(custom_id)
            prompt, params, echo = _parse_request(value, defaults)
        except ValueError as error:
            yield BatchLine(custom_id, error=f"line {number}: {error}")
        else:
            yield BatchLine(custom_id, prompt, params, echo=echo)


def _parse_object(raw: bytes) -> dict:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error
    return value


def _custom_id(value: dict, default: str) -> str:
    custom_id = value.get("custom_id", default)
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id is {custom_id!r}; it must be a non-empty string")
    return custom_id


def _parse_request(
    value: dict, defaults: SamplingParams
) -> tuple[str | list[int], SamplingParams, bool]:
    body = value
    if "body" in value:
        _refuse_unknown("field", value, _LINE_KEYS)
        if value.get("method", "POST") != "POST" or value.get("url", URL) != URL:
            raise ValueError(f"method and url must be POST and {URL}")
        body = value["body"]
        if not isinstance(body, dict):
            raise ValueError("body must be a JSON object")
    else:
        body = {key: field for key, field in value.items() if key != "custom_id"}
    _refuse_unknown("body field", body, _BODY_KEYS)
    given = {name: body[name] for name in _PARAMS if body.get(name) is not None}
    if not isinstance(given.get("stop", []), str | list):
        raise ValueError(f"stop is {given['stop']!r}; it must be a string or a list of strings")
    fields = {name: getattr(defaults, name) for name in _PARAMS} | given
    echo = body.get("echo") or False
    if not isinstance(echo, bool):
        raise ValueError(f"echo is {echo!r}; it must be true or false")
    if echo:
        fields["prompt_logprobs"] = fields["logprobs"]
    return _parse_prompt(body), SamplingParams(**fields), echo


def _parse_prompt(body: dict) -> str | list[int]:
    if "prompt" not in body:
        raise ValueError("prompt is missing")
    prompt = body["prompt"]
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
    custom_id: str, model: str, output: RequestOutput, echo: Echo | None = None
) -> dict:
    """The response line of one answered request (usage counts the end token as generated).

    echo: the prompt, if its text is to come before the answer's.
    """
    answer = output.outputs[0]
    text = (echo.text if echo else "") + answer.text
    prompt_tokens, new_tokens = len(output.prompt_token_ids), len(answer.token_ids)
    body = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "text": text,
                "logprobs": logprobs_object(output, text, echo),
                "finish_reason": answer.finish_reason,
            }
        ],
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
