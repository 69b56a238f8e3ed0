"""How every command begins: files that it is to write are checked before anything is touched.

Files that would be lost on a cluster: Ray deletes the folder that a submitted job runs in.

Knows paths and environment variables; not Ray.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import typer

from flexgen_ray.files.input_lines import STANDARD_STREAM
from flexgen_ray.files.output_files import check_distinct, check_folders, sidecar_paths

_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for a submitted job's own process
_PACKAGES = re.compile(r"/session_[^/]+/runtime_resources/")


def check_kept(written: Mapping[str, Path], environment: Mapping[str, str]) -> None:
    """Refuses files, by the option that gives them, that a Ray job would lose.

    Those are relative paths in a submitted job, and all paths in Ray's folders for packages. Raises
    ValueError with the whole path, the node and the remedy.
    """
    for option, path in written.items():
        place = os.path.realpath(path)
        is_package = _PACKAGES.search(place) is not None
        is_relative = _IN_JOB in environment and not path.is_absolute()
        if path != STANDARD_STREAM and (is_package or is_relative):
            fate = "Ray deletes after the job" if is_package else "the job was started in by Ray"
            raise ValueError(
                f"{option} {path} would be {place} on node {socket.gethostname()}, in a folder "
                f"that {fate}; give an absolute path on a disk that stays, best a shared one"
            )


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
            beside = sidecar_paths(written["--output"])
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
