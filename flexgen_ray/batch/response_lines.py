"""Response lines of a job, as OpenAI's Batch API writes them: answers and errors.

Knows JSON and request outputs; nothing of models or input lines.
"""

from __future__ import annotations

import time
import uuid

from flexgen_ray.batch.logprobs import Echo, chat_logprobs, logprobs_object
from flexgen_ray.files.json_text import parse_object
from flexgen_ray.request import RequestOutput

SERVER_ERROR = 500


def response_row(
    custom_id: str,
    model: str,
    output: RequestOutput,
    is_chat: bool = False,
    echo: Echo | None = None,
    top: int = 0,
) -> dict:
    """Return the response line of an answered request. Its usage counts the end token as generated.

    echo: the prompt, if its text is to come before the answer's.
    top: number of likeliest tokens to list for each token of a chat with log-probabilities.
    """
    choices = []
    for answer in output.outputs:
        if is_chat:
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            content: dict = {"message": message, "logprobs": chat_logprobs(answer, top)}
        else:
            text = (echo.text if echo else "") + answer.text
            content = {"text": text, "logprobs": logprobs_object(output, answer, text, echo)}
        choices.append({"index": answer.index, **content, "finish_reason": answer.finish_reason})
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


def join_rows(rows: list[dict]) -> dict:
    """Join the rows of a request's prompts into one response line, with choices numbered through.

    If one of the rows is an error, returns that row.
    """
    for row in rows:
        if row["response"]["status_code"] != 200:
            return row
    bodies = [row["response"]["body"] for row in rows]
    choices = [choice for body in bodies for choice in body["choices"]]
    usage = {name: sum(body["usage"][name] for body in bodies) for name in bodies[0]["usage"]}
    bodies[0] |= {
        "choices": [choice | {"index": place} for place, choice in enumerate(choices)],
        "usage": usage,
    }
    return rows[0]


def with_columns(row: dict, columns: dict) -> dict:
    """Return an output line with the user's columns of its input line, if there are any."""
    return row | {"columns": columns} if columns else row


def error_row(custom_id: str, message: str, status_code: int = 400) -> dict:
    """Return the response line of a request that can't be answered.

    status_code: 400 if the request is at fault, SERVER_ERROR if answering it failed.
    """
    kind = "server_error" if status_code == SERVER_ERROR else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return _row(custom_id, status_code, {"error": error})


def _row(custom_id: str, status_code: int, body: dict) -> dict:
    response = {"status_code": status_code, "request_id": f"req-{uuid.uuid4().hex}", "body": body}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


def error_message(row: dict) -> str | None:
    """Return the error message of an output line; None if the line holds an answer.

    The body may be an object or, as some servers write it, a string that holds one.
    """
    response, error = row.get("response") or {}, row.get("error")
    if error is None and response.get("status_code") == 200:
        return None
    body = response.get("body")
    if isinstance(body, str):
        body = parse_object(body.encode())
    error = error or (body or {}).get("error") or {}
    return str(error.get("message", "no reason is given"))
