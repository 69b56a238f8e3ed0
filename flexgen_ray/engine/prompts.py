"""Parsing of prompts, chats and sampling parameters in all forms that Python users pass.

Every method of LLM follows one rule: a str, a dict in one of vLLM's forms, and a sequence of token
ids are one prompt each; any other iterable holds many prompts, which are answered in its order.
Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from operator import index as as_int
from typing import Any, Literal

from flexgen_ray.request import Request, RequestOutput, SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
Chat = Sequence[Mapping[str, Any]]
OnError = Literal["raise", "return"]
Make = Callable[[int, Any, SamplingParams], Request]
_FORMS = 'a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'
_KEYS = ("prompt", "prompt_token_ids")
_MAX_SHOWN = 60  # characters of a wrong value that an error quotes


@dataclass(frozen=True)
class ParsedPrompt:
    """One prompt: its text, its token ids, or both; None for what was not passed."""

    text: str | None
    token_ids: list[int] | None = None


def parse_prompt(prompt: object) -> ParsedPrompt:
    """Parse one prompt; raises ValueError for a value that is no prompt."""
    if isinstance(prompt, str):
        return ParsedPrompt(str(prompt))  # numpy's strings become Python's
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    values = sequence_of(prompt)
    if values is None:
        raise ValueError(f"the prompt is {_shown(prompt)}; it must be {_FORMS}")
    return ParsedPrompt(None, token_ids(values))


def token_ids(values: Iterable) -> list[int]:
    """Token ids as Python integers; ValueError names the first value that is no token id."""
    return [
        value if type(value) is int and value >= 0 else _token_id(place, value)
        for place, value in enumerate(values)
    ]


def sequence_of(value: object) -> list | None:
    """Items of a list, tuple, other sequence, numpy array or tensor; None for any other value."""
    if isinstance(value, str | bytes | bytearray | memoryview):
        return None
    if _is_array(value):
        items = value.tolist()  # type: ignore[attr-defined]
        return items if isinstance(items, list) else None
    return list(value) if isinstance(value, Sequence) else None


def several_prompts(prompts: object) -> list:
    """List of the unparsed prompts; ValueError if `prompts` is no prompt and no iterable."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    return _one_or_many("prompts", prompts, Number)


def several_chats(chats: object) -> list:
    """List of the unparsed chats, each a list of messages; ValueError if there are none."""
    if isinstance(chats, str | Mapping):
        raise ValueError(
            f'messages is {_shown(chats)}; it must be a list of {{"role": ..., "content": ...}}, '
            "or an iterable of such lists"
        )
    return [_list_of_messages(chat) for chat in _one_or_many("messages", chats, Mapping)]


def several_params(params: object, num_prompts: int, what: str) -> list[SamplingParams]:
    """List of one SamplingParams a prompt, from one for all prompts or an iterable.

    what: plural of the items for errors, "prompts" or "chats". Raises ValueError for a value that
    is no SamplingParams, naming its place, and if there are fewer or more than prompts.
    """
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if isinstance(params, str | Mapping):
        raise ValueError(f"sampling_params is {_shown(params)}; make it SamplingParams(...)")
    each = _list("sampling_params", params)
    for place, one in enumerate(each):
        if not isinstance(one, SamplingParams):
            raise ValueError(
                f"sampling_params[{place}] is {_shown(one)}; it must be SamplingParams(...)"
            )
    if len(each) != num_prompts:
        raise ValueError(f"{num_prompts} {what} but {len(each)} sampling_params; match them")
    return each


def make_requests(
    what: str,
    items: Iterable,
    params: list[SamplingParams],
    make: Make,
    errors: OnError,
) -> tuple[list[Request], list[RequestOutput]]:
    """Make requests of all items; returns them, and an output with `.error` for each bad item.

    make: returns a request from an item's index, the item and its parameters, or raises ValueError.
    errors: "return" collects the errors; "raise" raises the first as a ValueError with its index.
    """
    if errors not in ("raise", "return"):
        raise ValueError(f'errors is {errors!r}; it must be "raise" or "return"')
    made: list[Request] = []
    failed: list[RequestOutput] = []
    for index, (item, one) in enumerate(zip(items, params, strict=True)):
        try:
            made.append(make(index, item, one))
        except ValueError as error:
            message = f"{what}[{index}]: {error}"
            if errors == "raise":
                others = '; errors="return" would answer the others' if len(params) > 1 else ""
                raise ValueError(message + others) from error
            failed.append(RequestOutput(index, text_of(item), [], error=message))
    return made, failed


def text_of(prompt: object) -> str | None:
    """Text of a prompt; None for a prompt of token ids alone."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return str(text) if isinstance(text, str) else None


def _parse_mapping(prompt: Mapping) -> ParsedPrompt:
    fields = {key: value for key, value in prompt.items() if value is not None}
    if unknown := [key for key in fields if key not in _KEYS]:
        raise ValueError(f"the prompt has the key {unknown[0]!r}; it must be {_FORMS}")
    text = fields.get("prompt")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the prompt's text is {_shown(text)}; it must be a string")
    if "prompt_token_ids" not in fields:
        if text is None:
            raise ValueError(f"the prompt is {_shown(prompt)}; it must be {_FORMS}")
        return ParsedPrompt(str(text))
    values = sequence_of(fields["prompt_token_ids"])
    if values is None:
        wrong = _shown(fields["prompt_token_ids"])
        raise ValueError(f"prompt_token_ids is {wrong}; it must be a list of token ids")
    return ParsedPrompt(text, token_ids(values))


def _token_id(place: int, value: object) -> int:
    try:
        number = -1 if isinstance(value, bool) else as_int(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(
            f"token {place} of the prompt is {_shown(value)}; token ids are integers from 0 up"
        )
    return number


def _one_or_many(what: str, values: object, item_of_one: type) -> list:
    """List of one item, if `values` is a sequence of `item_of_one` (one prompt, or one chat); else
    the list of its items."""
    items = _list(what, values)
    is_sequence = isinstance(values, Sequence) or _is_array(values)
    return [items] if is_sequence and items and isinstance(items[0], item_of_one) else items


def _list(what: str, values: object) -> list:
    """Items of any ordered iterable; ValueError for a table, a set, or no iterable."""
    if hasattr(values, "columns"):
        raise ValueError(f"{what} is a {type(values).__name__}, a table; give one of its columns")
    if isinstance(values, set | frozenset):
        raise ValueError(f"{what} is a set, which has no order; give a list")
    if hasattr(values, "to_pylist"):  # pyarrow's columns hold scalars of pyarrow's own
        return values.to_pylist()
    items = sequence_of(values)
    if items is not None:
        return items
    if isinstance(values, Iterable) and not isinstance(values, bytes | bytearray | memoryview):
        with_iter: Iterable = values
        if not _is_array(values):
            return list(with_iter)
    raise ValueError(f"{what} is {_shown(values)}; it must be an iterable, such as a list")


def _list_of_messages(chat: object) -> object:
    items = sequence_of(chat)
    return chat if items is None else items


def _is_array(value: object) -> bool:
    """True for a numpy array, or a tensor of any library; False for a column of a table.

    Columns have no `__dlpack__`, or they have `to_pylist`.
    """
    are_there = (hasattr(value, name) for name in ("__dlpack__", "tolist"))
    return all(are_there) and not hasattr(value, "to_pylist")


def _shown(value: object) -> str:
    text = repr(value)
    text = text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
    return f"{text} ({type(value).__name__})"
