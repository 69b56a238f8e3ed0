"""The fields of a request's body, by OpenAI's and vLLM's names, and how each is treated.

_SUPPORTED fields are implemented. _IGNORED ones can't change an answer. _MISSING ones could, and
aren't implemented, so only their neutral values are accepted, which change nothing. Knows names and
values; nothing of models.
"""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache

from flexgen_ray.request import SamplingParams

PARAMS = {it.name for it in fields(SamplingParams)} - {"prompt_logprobs"}
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"

_SUPPORTED = {
    COMPLETION: PARAMS | {"prompt", "max_completion_tokens", "echo"},
    CHAT: PARAMS
    | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice"}
    | {"add_generation_prompt", "continue_final_message"}
    | {"chat_template_kwargs", "reasoning_effort"},
}
_IGNORED = {
    "cache_salt", "guided_decoding_backend", "guided_whitespace_pattern", "metadata", "model",
    "parallel_tool_calls", "prediction", "priority", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "safety_identifier", "service_tier", "store", "stream_options", "user",
}  # fmt: skip
# Reasons and remedies that several of the missing fields share.
_FREE = "answers can't be constrained to a format; ask for it in the prompt"
_TEXT = "only text is read and written"
_IDS = "answers in files are text; flexgen_ray.LLM gives token ids"
# {field: (its neutral values, the reason and the remedy)}
_MISSING: dict[str, tuple[tuple, str]] = {
    "best_of": ((1,), "answers are not compared; give n for several"),
    "detokenize": ((True,), _IDS),
    "early_stopping": ((False,), "there is no beam search"),
    "guided_choice": ((), _FREE),
    "guided_grammar": ((), _FREE),
    "guided_json": ((), _FREE),
    "guided_regex": ((), _FREE),
    "length_penalty": ((1,), "there is no beam search"),
    "logits_processors": (([],), "code of others is never run"),
    "lora_request": ((), "there are no adapters; merge the adapter into the model"),
    "prompt_logprobs": ((False,), "give echo and logprobs with a prompt"),
    "response_format": (({"type": "text"},), _FREE),
    "return_token_ids": ((False,), _IDS),
    "return_tokens_as_token_ids": ((False,), _IDS),
    "spaces_between_special_tokens": ((True,), "the tokenizer decides"),
    "stream": ((False,), "answers are written whole, each as it is finished"),
    "structural_tag": ((), _FREE),
    "structured_outputs": (({},), _FREE),
    "truncate_prompt_tokens": ((), "prompts are never cut; shorten the prompt"),
    "use_beam_search": ((False,), "there is no beam search"),
    "vllm_xargs": (({},), "there are no extensions"),
}
_MISSING_BY_URL: dict[str, dict[str, tuple[tuple, str]]] = {
    COMPLETION: {
        "add_special_tokens": ((True,), "give the prompt as token ids instead"),
        "prompt_embeds": ((), _TEXT),
        "suffix": (("",), "nothing is inserted before a text; give the prompt alone"),
        "top_logprobs": ((), "it is for chats; for a prompt give the number as logprobs"),
    },
    CHAT: {
        "add_special_tokens": ((False,), "the chat template has them"),
        "audio": ((), _TEXT),
        "chat_template": ((), "put it beside the model, as chat_template.jinja"),
        "echo": ((False,), "it is for prompts, not for chats"),
        "function_call": (("none", "auto"), "it is superseded; give tools and tool_choice"),
        "functions": (([],), "it is superseded; give tools"),
        "include_reasoning": ((True,), "thinking is part of an answer's text"),
        "mm_processor_kwargs": (({},), _TEXT),
        "modalities": ((["text"],), _TEXT),
        "verbosity": (("medium",), "ask for it in the messages"),
        "web_search_options": ((), "nothing is searched"),
    },
}


def used_fields(url: str, body: dict) -> dict:
    """Return the fields of a body that affect its answer.

    Raises ValueError, with the reason, for a field that is unknown or not implemented.
    """
    used, missing = {}, _MISSING | _MISSING_BY_URL[url]
    for name, value in body.items():
        if name in _SUPPORTED[url]:
            used[name] = value
        elif name in missing:
            _refuse_unless_neutral(name, value, *missing[name])
        elif name not in _IGNORED:
            raise ValueError(
                f"body field {name!r} is not supported{_nearest(name)}; supported are "
                f"{', '.join(sorted(_SUPPORTED[url]))}"
            )
    return used


def split_columns(url: str, line: dict) -> tuple[dict, dict]:
    """Split a line without a body into the request's fields and the user's own columns.

    Ignored fields count as columns, and are copied to the output line.
    """
    known = _SUPPORTED[url] | _MISSING.keys() | _MISSING_BY_URL[url].keys()
    body = {name: value for name, value in line.items() if name in known}
    return body, {name: value for name, value in line.items() if name not in known}


def refuse_fields(columns: dict) -> None:
    """Raise ValueError for a column whose name is nearly a field's: it may be a misspelt field."""
    for name in columns.keys() - _IGNORED:
        if nearest := _nearest(name):
            raise ValueError(
                f"column {name!r} is a field that is misspelt or out of its place{nearest}; "
                "correct that, or rename the column if it is your own"
            )


def _refuse_unless_neutral(name: str, value: object, neutral: tuple, reason: str) -> None:
    """Raise ValueError, with the reason, unless the value is a neutral one of a missing field."""
    # In Python True equals 1, in JSON it doesn't.
    if any(value == it and isinstance(value, bool) == isinstance(it, bool) for it in neutral):
        return
    only = f"is {value!r}; only {' or '.join(map(repr, neutral))} is supported"
    raise ValueError(f"{name} {only if neutral else 'is not supported'}: {reason}")


@lru_cache(maxsize=1024)
def _nearest(name: str) -> str:
    """Return a hint at the supported field with the most similar name; "" if none is similar."""
    names = _SUPPORTED[COMPLETION] | _SUPPORTED[CHAT]
    close = get_close_matches(name.lower().replace("-", "_"), sorted(names), n=1, cutoff=0.85)
    return f" (is {close[0]} meant?)" if close else ""
