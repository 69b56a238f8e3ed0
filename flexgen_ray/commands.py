"""How every command begins: files that it is to write are checked before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import typer

from flexgen_ray.io.files import check_distinct, check_folders, siblings
from flexgen_ray.io.lost import check_kept

# Texts that may be paths of files to read; an --offload-dir is a place, not what lies there.
_PERHAPS_PATHS = ("model", "hardware")
_PLACES = ("offload_dir",)


class App(typer.Typer):
    """Commands by name. An option that writes a file is declared `writable=True`."""

    def command(self, name: str | None = None, **options: Any) -> Callable:
        """Registers a function, which runs once its files are checked."""
        register = super().command(name, **options)
        return lambda function: register(_checked(function))


def is_written(parameter: Parameter) -> bool:
    """True if a command's parameter gives a file to write."""
    return any(getattr(it, "writable", False) for it in _declared(parameter))


def _checked(function: Callable[..., None]) -> Callable[..., None]:
    parameters = signature(function, eval_str=True).parameters

    @wraps(function)
    def run(**values: Any) -> None:
        written: dict[str, Path] = {}
        read: dict[str, Path] = {}
        for name, parameter in parameters.items():
            for path in _paths(name, values.get(name)):
                (written if is_written(parameter) else read)[_option(parameter)] = path
        if "--output" in written and function.__name__ == "generate":
            beside = siblings(written["--output"])
            written |= {f"--output's {path.suffix}": path for path in beside}
        folder = {"--output": values["output"]} if function.__name__ == "quantize" else {}
        check_kept(written | folder, os.environ)
        check_distinct(written, read)
        if function.__name__ == "calibrate":
            for path in written.values():
                path.parent.mkdir(parents=True, exist_ok=True)
        check_folders(written)
        function(**values)

    return run


def _declared(parameter: Parameter) -> tuple:
    return getattr(parameter.annotation, "__metadata__", ())


def _option(parameter: Parameter) -> str:
    """The option's name as users type it."""
    given = (name for it in _declared(parameter) for name in it.param_decls or ())
    return next(given, f"--{parameter.name.replace('_', '-')}")


def _paths(name: str, value: object) -> Iterator[Path]:
    """The paths that a parameter's value gives."""
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, Path) and name not in _PLACES:
            yield part
        elif isinstance(part, str) and name in _PERHAPS_PATHS and Path(part).exists():
            yield Path(part)
