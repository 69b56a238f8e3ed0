"""`flexgen-ray bench …`: the benchmarks by name."""

from __future__ import annotations

import typer

from flexgen_ray.bench.lanes import lanes

app = typer.Typer(name="bench", help="Measure, and end in one JSON line.", no_args_is_help=True)
app.command()(lanes)
