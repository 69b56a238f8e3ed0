"""Text on its way to a terminal: none of its characters can steer that."""

from __future__ import annotations

import re
from contextlib import suppress

import typer

# Controls but for tab and newline, marks that turn the direction of text, halves of surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with control characters as escapes, such as `\\x1b`; what files hold may be any."""
    return _UNSAFE.sub(lambda it: it[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """A line for people, on standard error, while there is one."""
    with suppress(OSError):
        typer.echo(printable(text), err=True)


def display(text: str = "") -> None:
    """A line of a command's result, on standard output."""
    typer.echo(printable(text))
