"""How a benchmark becomes a command of its own: `python -m benchmarks.NAME`."""

from __future__ import annotations

from collections.abc import Callable

from flexgen_ray.cli.app import App
from flexgen_ray.cli.exits import run
from flexgen_ray.reporting.progress import with_progress


def as_app(benchmark: Callable[..., None]) -> App:
    """A Typer app of one command, the benchmark, with its progress on standard error."""
    app = App(add_completion=False)
    app.command()(with_progress(benchmark, f"benchmarks.{benchmark.__name__}"))
    return app


def run_as_command(benchmark: Callable[..., None]) -> None:
    """Runs a benchmark with the options of the command line, and ends the process."""
    run(as_app(benchmark))
