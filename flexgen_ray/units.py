"""Parsing and formatting of bytes and seconds: "16GiB" to an int, floats to "15.2 GiB", "3.2 h"."""

import re
from operator import index

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(text: str | int) -> int:
    """Bytes from text such as "16GiB", "512 MiB", "1.5GB" or "1000"; ints are returned as they are.

    Raises ValueError for other text.
    """
    if not isinstance(text, str):
        return index(text)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write 16GiB, 512MiB or a number of bytes")
    return round(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(count: float) -> str:
    """Format bytes in the largest binary unit in which they are at least one, such as 15.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Format seconds with two or three digits, in seconds, minutes or hours."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.2g} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 9.95 else f"{hours:,.0f} h"
