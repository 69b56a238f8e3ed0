"""Base of all commands: their names of options, the layout of their help, and checks of files.

Options keep their former names, and help is grouped by subject. Before a command runs, the files
that it will write are checked: no two options may write the same file or one that is read, and Ray
must not delete the files (it deletes the folder that a submitted job runs in).

Knows paths and environment variables; not Ray.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from flexgen_ray.files.input_lines import STANDARD_STREAM
from flexgen_ray.files.output_files import check_distinct, check_folders, sidecar_paths

# Names that options had before; they still work, in every command that has the new option.
FORMER_NAMES = {
    "--stages": "--pipeline-parallel-size",
    "--sparsity": "--attention-sparsity",
    "--no-ray": "--no-use-ray",
    "--dummy-weights": "--load-format=dummy",
    "--hardware": "--plan-for",
}
_HELP_WIDTH = 100
_IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for a submitted job's own process
_PACKAGES = re.compile(r"/session_[^/]+/runtime_resources/")
# Options with a text that may be the path of a file to read.
_MAYBE_PATHS = ("model", "hardware", "plan_for")


class Writes(Enum):
    """Annotation of an option that writes something other than one file in an existing folder."""

    JOB = "a job's output, which has files beside it"
    FOLDER = "a new folder"
    INTO_NEW_FOLDER = "a file, whose folder is made"
    SCRATCH = "temporary data, into a folder"


class App(typer.Typer):
    """A Typer app whose commands check their files. Options that write one have `writable=True`."""

    def command(self, name: str | None = None, **options: Any) -> Callable:
        """Register a function as a command that checks its files before it runs."""
        settings = {"max_content_width": _HELP_WIDTH}
        register = super().command(name, cls=Command, context_settings=settings, **options)
        return lambda function: register(_checked(function))


class Command(TyperCommand):
    """A command whose options keep their former names, and whose help groups them by subject."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._renamed(args))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            heading = getattr(parameter, "rich_help_panel", None) or ""
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(
                heading or ("Other options" if len(sections) > 1 else "Options")
            ):
                formatter.write_dl(records)

    def _renamed(self, arguments: list[str]) -> list[str]:
        """The arguments, with former names of options replaced by their present ones."""
        names = {name for each in self.params for name in (*each.opts, *each.secondary_opts)}
        flags = {name for each in self.params if getattr(each, "is_flag", False)
                 for name in (*each.opts, *each.secondary_opts)}  # fmt: skip
        renamed, is_value = [], False
        for argument in arguments:
            name, equals, value = argument.partition("=")
            new = FORMER_NAMES.get(name, "")
            if not is_value and name not in names and new.partition("=")[0] in names:
                argument = f"{new}{equals}{value}"
            is_value = not is_value and argument in names - flags
            renamed.append(argument)
        return renamed


def refuse_deleted_folders(written: Mapping[str, Path], environment: Mapping[str, str]) -> None:
    """Refuse output files in folders that Ray deletes.

    These are relative paths in a submitted job, and all paths in Ray's folders for packages.
    written: paths by the option that gives them. environment: environment variables.
    Raises ValueError with the whole path, the node and the remedy.
    """
    for option, path in written.items():
        place = os.path.realpath(path)
        is_package = _PACKAGES.search(place) is not None
        is_relative = _IN_JOB in environment and not path.is_absolute()
        if path != STANDARD_STREAM and (is_package or is_relative):
            folder = "Ray deletes after the job" if is_package else "Ray started the job in"
            raise ValueError(
                f"{option} {path} would be {place} on node {socket.gethostname()}, in a folder "
                f"that {folder}; give an absolute path, best on a disk that all nodes share"
            )


def writes_file(parameter: Parameter) -> bool:
    """True if the value of a command's parameter is a file to write."""
    return any(getattr(each, "writable", False) for each in _declared(parameter))


def _checked(function: Callable[..., None]) -> Callable[..., None]:
    """The command with checks of the files that it reads and writes before it runs."""
    parameters = signature(function, eval_str=True).parameters

    @wraps(function)
    def run(**values: Any) -> None:
        written: dict[str, Path] = {}
        folders: dict[str, Path] = {}
        read: dict[str, Path] = {}
        for name, parameter in parameters.items():
            kind, option = _kind(parameter), _option(parameter)
            for path in _paths(name, values.get(name)):
                if writes_file(parameter):
                    written[option] = path
                elif kind is not Writes.SCRATCH:
                    read[option] = path
                if kind is Writes.FOLDER:
                    folders[option] = path
                if kind is Writes.JOB:
                    written |= {f"{option}'s {each.suffix}": each for each in sidecar_paths(path)}
        refuse_deleted_folders(written | folders, os.environ)
        check_distinct(written, read)
        for parameter in parameters.values():
            if _kind(parameter) is Writes.INTO_NEW_FOLDER and _option(parameter) in written:
                written[_option(parameter)].parent.mkdir(parents=True, exist_ok=True)
        check_folders(written)
        function(**values)

    return run


def _declared(parameter: Parameter) -> tuple:
    """Metadata in the parameter's Annotated type, such as its typer.Option."""
    return getattr(parameter.annotation, "__metadata__", ())


def _kind(parameter: Parameter) -> Writes | None:
    """The parameter's `Writes` annotation, if it has one."""
    return next((each for each in _declared(parameter) if isinstance(each, Writes)), None)


def _option(parameter: Parameter) -> str:
    """The option's name on the command line, such as --offload-dir."""
    names = (name for each in _declared(parameter) for name in getattr(each, "param_decls", ()))
    return next(names, f"--{parameter.name.replace('_', '-')}")


def _paths(name: str, value: object) -> Iterator[Path]:
    """The paths in a parameter's value; a text counts if it may be a path and exists."""
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, Path):
            yield part
        elif isinstance(part, str) and name in _MAYBE_PATHS and Path(part).exists():
            yield Path(part)
