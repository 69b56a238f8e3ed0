"""Errors for unknown names: they name the nearest known name, or the name that is used here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
NO_HINTS: Mapping[str, str] = {}


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
