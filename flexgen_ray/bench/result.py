"""How every benchmark ends: one JSON line, with what made it."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from flexgen_ray.report import environment


def finish(result: dict, device: str, path: Path | None) -> None:
    """Prints the result with hardware, versions, command and date, and writes it if asked."""
    whole = environment(device) | result
    typer.echo(json.dumps(whole))
    if path is not None:
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
