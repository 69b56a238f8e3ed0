"""Makes a benchmark a command of its own, `python -m benchmarks.NAME`. Knows no benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from flexgen_ray.cli.app import App
from flexgen_ray.cli.exits import run
from flexgen_ray.reporting.progress import with_progress


def as_app(benchmark: Callable[..., None]) -> App:
    """Typer app of one command, the benchmark, which shows its progress on standard error."""
    app = App(add_completion=False, rich_markup_mode=None)
    app.command()(with_progress(benchmark, f"benchmarks.{benchmark.__name__}"))
    return app


def run_as_command(benchmark: Callable[..., None]) -> None:
    """Run a benchmark with the options of the command line, and end the process."""

    @wraps(benchmark)
    def named(**options: Any) -> None:
        # Results hold the command that made them; argv[0] is only this file's path.
        sys.argv[0] = f"python -m benchmarks.{benchmark.__name__}"
        benchmark(**options)

    run(as_app(named))
