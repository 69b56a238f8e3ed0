"""The JSON results that benchmarks print."""

from __future__ import annotations

import json
from importlib import import_module

from typer.testing import CliRunner

from benchmarks.command import as_app
from flexgen_ray.cli.app import App
from flexgen_ray.cli.main import app


def bench(*arguments: object) -> dict:
    """The result of `flexgen-ray bench ARGUMENTS`."""
    return run_app(app, ["bench", *map(str, arguments)])


def benchmark(name: str, *arguments: object) -> dict:
    """The result of `python -m benchmarks.NAME ARGUMENTS`."""
    function = getattr(import_module(f"benchmarks.{name}"), name)
    return run_app(as_app(function), [*map(str, arguments)])


def run_app(app: App, arguments: list[str]) -> dict:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout.splitlines()[-1])
