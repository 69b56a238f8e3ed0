"""A chat's messages, as OpenAI's API has them. Knows their form, not how a model words them."""

from __future__ import annotations

Messages = list[dict[str, str]]
_KEYS = {"role", "content", "name"}


def parse_messages(value: object) -> Messages:
    """Messages with text alone; a content of several parts becomes one, a line or more a part.

    Raises ValueError, naming the place, for what isn't text or isn't known.
    """
    if not isinstance(value, list) or not value:
        raise ValueError('messages must be a list of {"role": ..., "content": ...}, one at least')
    return [_parse_message(f"messages[{place}]", message) for place, message in enumerate(value)]


def _parse_message(place: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {message!r}; it must be an object with role and content")
    fields = {key: field for key, field in message.items() if field is not None}
    unknown = sorted(set(fields) - _KEYS)
    if unknown:
        raise ValueError(
            f"{place} has {unknown[0]!r}, which is not supported; supported are "
            f"{', '.join(sorted(_KEYS))}"
        )
    if isinstance(fields.get("content"), list):
        fields["content"] = "\n".join(_part(place, part) for part in fields["content"])
    for key in ("role", "content"):
        fields.setdefault(key, None)
    for key, field in fields.items():
        if not isinstance(field, str):
            raise ValueError(f"{place} has the {key} {field!r}; it must be a string")
    return fields


def _part(place: str, part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ValueError(f"{place} has the part {part!r}; only parts of type text are supported")
    return text
