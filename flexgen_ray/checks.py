"""Checks of values and of names, whose errors are one sentence each.

The error for a wrong value says what it may be; the error for an unknown name has the nearest known
name, or the name that is used here. Knows no option itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from math import inf
from numbers import Integral, Real
from typing import Any, TypeVar, cast

Check = tuple[Callable[[Any], bool], str]  # is the value right? and what it must be, as a phrase
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
NO_HINTS: Mapping[str, str] = {}
_MAX_SHOWN = 60  # characters of a wrong value that an error quotes


def check_values(
    values: Mapping[str, object], checks: Mapping[str, Check], owner: str = ""
) -> None:
    """Raise ValueError for the first value that fails its check.

    The sentence is "NAME is VALUE; it must be ...". owner: text before it, such as "policy: ".
    """
    for name, (is_right, wanted) in checks.items():
        if not is_right(values[name]):
            raise ValueError(wrong_value(owner + name, values[name], wanted))


def wrong_value(name: str, value: object, wanted: str) -> str:
    """Sentence of an error for a wrong value. wanted: the phrase after "it must be"."""
    shown = repr(value)
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
    return f"{name} is {shown}; it must be {wanted}"


def integer(least: float = -inf, most: float = inf, numpy: bool = False) -> Callable[[Any], bool]:
    """Check for an int (no bool) from `least` to `most`. numpy: accept numpy's integers too."""
    kind = Integral if numpy else int

    def is_right(value: Any) -> bool:
        if not isinstance(value, kind) or type(value) is bool:
            return False
        return bool(least <= cast(int, value) <= most)

    return is_right


def number(least: float, most: float = inf, above: bool = False) -> Callable[[Any], bool]:
    """Check for a real number (no bool, no NaN) from `least` to `most`.

    above: refuse `least` itself.
    """

    def is_right(value: Any) -> bool:
        if not isinstance(value, Real) or type(value) is bool:
            return False
        return bool(least <= cast(float, value) <= most) and not (above and value == least)

    return is_right


def optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Check that accepts None too."""
    return lambda value: value is None or check(value)


def instance(*types: type) -> Callable[[Any], bool]:
    """Check for an instance of one of these types."""
    return lambda value: isinstance(value, types)


def one_of(*values: str) -> Check:
    """Check for one of these texts, with its phrase."""
    phrase = " or ".join(f'"{value}"' for value in values)
    return lambda value: isinstance(value, str) and value in values, phrase


def unknown_name(
    owner: str, kind: str, names: Iterable[object], known: Iterable[str], hints: Mapping[str, str]
) -> str | None:
    """Sentence on the first name that isn't known; None if all are known.

    owner, kind: start of the sentence, such as "LLM" and "option". hints: {name of another system:
    the advice on what to use here}; for other names the sentence has the nearest known name.
    """
    known = list(known)
    name = next((name for name in names if name not in known), None)
    if name is None:
        return None
    start = f"{owner}: unknown {kind} {name!r}"
    if name in hints:
        return f"{start}; {hints[str(name)]}"
    near = get_close_matches(str(name), known, n=1, cutoff=0.6)
    if near:
        return f"{start}; did you mean {near[0]}?"
    return f"{start}; known are {', '.join(known)}"


def explains_unknown(hints: Mapping[str, str] = NO_HINTS) -> Callable[[type[T]], type[T]]:
    """Class decorator: the constructor's TypeError for an unknown option names the one to use."""

    def decorate(cls: type[T]) -> type[T]:
        own: Any = cls
        own.__init__ = _explained(own.__init__, cls.__name__, hints)
        return cls

    return decorate


def explains_call(name: str, hints: Mapping[str, str] = NO_HINTS) -> Callable[[F], F]:
    """Method decorator: a TypeError for an unknown option names the option to use instead.

    name: the method's name in the error.
    """
    return lambda method: _explained(method, name, hints)


def _explained(method: F, name: str, hints: Mapping[str, str]) -> F:
    known = list(signature(method).parameters)[1:]

    @wraps(method)
    def explained(self: Any, *values: Any, **options: Any) -> Any:
        try:
            return method(self, *values, **options)
        except TypeError:
            sentence = unknown_name(name, "option", options, known, hints)
            if sentence is None:
                raise
            raise TypeError(sentence) from None

    return cast(F, explained)
