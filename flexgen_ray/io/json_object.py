"""JSON objects in lines, and the custom_id of a line that isn't one. Knows bytes and JSON."""

from __future__ import annotations

import json
import re

from flexgen_ray.io.lines import MAX_LINE_BYTES

# Strings, integers and what structures JSON; the rest of a damaged line is skipped.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?\d+(?=\s*[,}])|[][{}:,]', re.DOTALL)


def parse_object(raw: bytes) -> dict:
    """The object of one line; ValueError says why there is none.

    Halves of surrogate pairs may be in it: `refuse_surrogates` looks for them.
    """
    if len(raw) > MAX_LINE_BYTES:
        raise ValueError(
            f"longer than {MAX_LINE_BYTES} bytes, the most a line may have; shorten its prompt"
        )
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def refuse_surrogates(value: object) -> None:
    """ValueError if a string in it, or a key, can't be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error


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


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice in one object; give it once")
    return value
