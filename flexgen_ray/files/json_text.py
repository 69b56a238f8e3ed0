"""JSON text, read and written more strictly than Python's json module does.

Written JSON has no NaN and no infinity; a line that is read holds one object without duplicate
keys.
"""

from __future__ import annotations

import json
import math
from typing import Any

from flexgen_ray.files.input_lines import MAX_LINE_BYTES


def to_json(value: Any, **options: Any) -> str:
    """Return the value as JSON text; NaN and infinities, which JSON lacks, become null.

    options: keyword arguments of json.dumps.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def parse_object(raw: bytes) -> dict:
    """Return the JSON object that one line holds.

    Raises ValueError with the reason if it holds none. Lone surrogates are let through;
    `refuse_surrogates` looks for them.
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
    """Raise ValueError if a string or key within the value can't be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error


def _finite(value: Any) -> Any:
    """Return a copy of the value with None in place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_finite(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _distinct(pairs: list[tuple[str, object]]) -> dict:
    """Build an object; raise ValueError for a key that occurs twice, where json keeps the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice in one object; give it once")
    return value
