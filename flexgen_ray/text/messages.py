"""Checks the messages and tools of a chat, in the form of OpenAI's API.

Knows the form of messages; nothing of chat templates.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]
_TEXTS = {"role", "content", "name", "tool_call_id"}
# Keys that servers use for an assistant's thinking; chat templates read the first or the second.
_THINKING = ("reasoning_content", "thinking", "reasoning")
_KEYS = _TEXTS | {"tool_calls", *_THINKING}
_IGNORED = {"annotations", "refusal"}  # keys of OpenAI's answers that say nothing for the next turn
# Variables of chat templates that chat_template_kwargs must not replace.
_RESERVED = {"messages", "tools", "add_generation_prompt", "continue_final_message", "strftime_now"}


@dataclass(frozen=True)
class ChatOptions:
    """Options for formatting a chat, by vLLM's names.

    tools: functions that the model may call, in OpenAI's form.
    add_generation_prompt: end the text with the start of an answer; by default true unless the
    final message is continued.
    continue_final_message: end the text within the final message, so that the answer continues it.
    chat_template_kwargs: variables for the chat template, such as {"enable_thinking": False}.
    Raises ValueError, naming the option, for an invalid value.
    """

    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        continues = self.continue_final_message
        if self.add_generation_prompt is None:
            object.__setattr__(self, "add_generation_prompt", not continues)
        for name in ("add_generation_prompt", "continue_final_message"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if continues and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt are both true; an answer goes on "
                "with a message or begins one, so give one of them"
            )
        if self.tools is not None:
            _check_tools(self.tools)
        kwargs = self.chat_template_kwargs
        if kwargs is None:
            object.__setattr__(self, "chat_template_kwargs", {})
        elif not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
            raise ValueError(
                f"chat_template_kwargs is {kwargs!r}; it must be an object, such as "
                '{"enable_thinking": false}'
            )
        elif reserved := sorted(kwargs.keys() & _RESERVED):
            raise ValueError(f"chat_template_kwargs has {reserved[0]!r}, which it can't set")


def parse_messages(value: object) -> Messages:
    """Return a chat's messages in the form that chat templates expect.

    A content of several text parts becomes one text, each part on lines of its own; arguments of
    tool calls become objects. Raises ValueError, naming the place, for content other than text and
    for unknown keys.
    """
    if not isinstance(value, list) or not value:
        raise ValueError('messages must be a list of {"role": ..., "content": ...}, one at least')
    return [_parse_message(f"messages[{place}]", message) for place, message in enumerate(value)]


def _parse_message(place: str, message: object) -> dict[str, Any]:
    """Check one message. place: its name in errors, such as "messages[2]"."""
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {message!r}; it must be an object with role and content")
    fields = {
        key: value
        for key, value in message.items()
        if value is not None and key not in _IGNORED and (key, value) != ("tool_calls", [])
    }
    unknown = sorted(set(fields) - _KEYS)
    if unknown:
        raise ValueError(
            f"{place} has {unknown[0]!r}, which is not supported; supported are "
            f"{', '.join(sorted(_KEYS))}"
        )
    if isinstance(fields.get("content"), list):
        fields["content"] = "\n".join(_part(place, part) for part in fields["content"])
    if "tool_calls" in fields:
        fields["tool_calls"] = _parse_calls(place, fields["tool_calls"])
        fields.setdefault("content", "")
    for key in ("role", "content"):
        fields.setdefault(key, None)
    for key in fields.keys() - {"tool_calls"}:
        if not isinstance(fields[key], str):
            raise ValueError(f"{place} has the {key} {fields[key]!r}; it must be a string")
    thoughts = next((fields[name] for name in _THINKING if name in fields), None)
    if thoughts is not None:
        fields = {"thinking": thoughts} | fields | {"reasoning_content": thoughts}
    return fields


def _part(place: str, part: object) -> str:
    """Return the text of one part of a message's content."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ValueError(f"{place} has the part {part!r}; only parts of type text are supported")
    return text


def _parse_calls(place: str, calls: object) -> list[dict[str, Any]]:
    """Return tool calls whose arguments are objects, as templates expect, not JSON in a string."""
    if not isinstance(calls, list):
        raise ValueError(f"{place} has the tool_calls {calls!r}; they must be a list")
    return [_parse_call(place, call) for call in calls]


def _parse_call(place: str, call: object) -> dict[str, Any]:
    """Check one tool call, and parse its arguments."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or "name" not in function:
        raise ValueError(
            f"{place} has the tool call {call!r}; it must be "
            '{"type": "function", "function": {"name": ..., "arguments": ...}}'
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{place}: arguments of a tool call are not valid JSON ({error})"
            ) from error
    if not isinstance(arguments, dict | None):
        raise ValueError(f"{place}: arguments of a tool call are {arguments!r}, not an object")
    return call | {"function": function | {"arguments": arguments or {}}}


def _check_tools(tools: object) -> None:
    """Raise ValueError, naming the place, unless every tool is a function in OpenAI's form."""
    if not isinstance(tools, list):
        raise ValueError(f"tools is {tools!r}; it must be a list")
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"tools[{place}] is {tool!r}; only functions are supported, as "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
