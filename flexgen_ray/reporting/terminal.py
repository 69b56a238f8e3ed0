"""Text for a terminal, with control characters escaped so that none takes effect there."""

from __future__ import annotations

import re
from contextlib import suppress

import typer

# Control characters except tab and newline, marks of text direction, lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with control characters as escapes, such as `\\x1b`; files may contain any."""
    return _UNSAFE.sub(lambda it: it[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Print a line for people on standard error; a closed one is ignored."""
    with suppress(OSError):
        typer.echo(printable(text), err=True)


def display(text: str = "") -> None:
    """Print a line of a command's result on standard output."""
    typer.echo(printable(text))
