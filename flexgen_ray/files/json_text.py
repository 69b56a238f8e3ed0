"""The JSON that is written: JSON has no NaN and no infinity, whatever Python's own writer makes."""

from __future__ import annotations

import json
import math
from typing import Any

from flexgen_ray.files.input_lines import MAX_LINE_BYTES


def to_json(value: Any, **options: Any) -> str:
    """The value as JSON text, every number that isn't finite as null; options: json.dumps's."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


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


def _finite(value: Any) -> Any:
    """A copy with None in the place of every number that isn't finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_finite(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice in one object; give it once")
    return value
