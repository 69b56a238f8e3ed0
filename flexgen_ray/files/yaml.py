"""Frozen dataclasses from YAML and back, as people write them; every error says where it is.

The unit in a field's name says how its value is written: `…bytes_per_s: 54.8GB`,
`…flops_per_s: 40e12`; integers may be sizes such as 16GiB. Knows fields; not what they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from datetime import date
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from flexgen_ray.checks import NO_HINTS, unknown_name
from flexgen_ray.files import text_files
from flexgen_ray.units import parse_bytes

Table = tuple[tuple[int, float], ...]  # {number: rate} in YAML, numbers rising
T = TypeVar("T")
_MIB = 2**20


def read_yaml(cls: type[T], path: Path) -> T:
    """ValueError (bad content) and OSError (no such file) name the path."""
    return from_values(cls, text_files.read_yaml(path), str(path))


def from_values(cls: type[T], values: object, where: str) -> T:
    """Unknown keys, missing ones and bad values are refused by name, after `where` they stand."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it must hold keys and values")
    kinds = get_type_hints(cls)
    if sentence := unknown_name(where, "key", values, kinds, NO_HINTS):
        raise ValueError(sentence)
    own: Any = cls
    wanted = [it.name for it in fields(own) if it.default is it.default_factory is MISSING]
    if missing := [name for name in wanted if name not in values]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    read = {key: _read(kinds[key], value, f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**read)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def to_yaml(instance: Any) -> str:
    """Text that from_values reads as an equal instance."""
    values = _written("", instance)
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def check_rates(instance: Any) -> None:
    """ValueError, naming the field, unless every number is finite and above 0."""
    for name, value in vars(instance).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not (isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; it must be a number above 0")


def check_table(name: str, table: Table) -> None:
    """ValueError, naming the field, unless numbers from 1 up rise and their rates are above 0."""
    numbers = [number for number, _ in table]
    if not numbers or numbers[0] < 1 or numbers != sorted(set(numbers)):
        raise ValueError(f"{name} has the keys {numbers}; they must be integers from 1 up, rising")
    for number, rate in table:
        if not (isfinite(rate) and rate > 0):
            raise ValueError(f"{name}: {number} is {rate!r}; it must be a number above 0")


def _read(kind: Any, value: object, where: str) -> Any:
    if kind == Table:
        return _read_table(value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return from_values(kind, value, where)
    if NoneType in get_args(kind):
        return None if value is None else _read(get_args(kind)[0], value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; it must be a list")
        inner = get_args(kind)[0]
        return tuple(_read(inner, it, f"{where}: {at + 1}") for at, it in enumerate(value))
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; it must hold keys and values")
        return {str(key): str(it) for key, it in value.items()}
    return _read_scalar(kind, value, where)


def _read_scalar(kind: type, value: object, where: str) -> Any:
    if kind is str and isinstance(value, date):
        return value.isoformat()
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind in (int, float) and isinstance(value, int | float | str) and value is not True:
        return _read_number(kind, value, where)
    raise ValueError(f"{where} is {value!r}; it must be of type {kind.__name__}")


def _read_number(kind: type, value: int | float | str, where: str) -> int | float:
    """YAML takes 40e12, which has no sign in its exponent, for text."""
    if kind is float:
        with suppress(ValueError):
            return float(value)
    is_size = kind is int or where.endswith("bytes_per_s")
    if is_size and not isinstance(value, float):
        try:
            return kind(parse_bytes(value))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    wanted = "an integer" if kind is int else "a number"
    raise ValueError(f"{where} is {value!r}; it must be {wanted}")


def _read_table(value: object, where: str) -> Table:
    if not isinstance(value, dict) or not all(type(key) is int for key in value):
        raise ValueError(f"{where} is {value!r}; write e.g. {{16: 40e12, 64: 153e12}}")
    read = {key: _read_scalar(float, it, f"{where}: {key}") for key, it in value.items()}
    return tuple(sorted(read.items()))


def _written(name: str, value: Any) -> Any:
    if is_dataclass(value):
        pairs = ((it.name, getattr(value, it.name)) for it in fields(value))
        return {key: _written(key, it) for key, it in pairs if it not in (None, "", {})}
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return {number: _written(name, rate) for number, rate in value}
        return [_written(name, it) for it in value]
    if isinstance(value, float):
        return _written_rate(name, value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= _MIB:
        return _written_size(value)
    return value


def _written_size(value: int) -> str | int | float:
    """In GiB if they have few digits."""
    if value % (64 * _MIB) == 0:
        return _shortest(f"{value / 2**30:.4f}", "GiB", parse_bytes, value)
    return _shortest(f"{value / _MIB:.6f}", "MiB", parse_bytes, value)


def _written_rate(name: str, value: float) -> Any:
    if name.endswith("bytes_per_s"):
        return _shortest(f"{value / 1e9:.9f}", "GB", parse_bytes, value)
    if name.endswith("flops_per_s"):
        return _shortest(f"{value / 1e12:.9f}", "e12", float, value)
    return value


def _shortest(text: str, unit: str, parse: Callable[[str], float], value: float) -> str | float:
    """The number with its unit if that says the same."""
    text = text.rstrip("0").rstrip(".") + unit
    return text if parse(text) == value else value
