"""How every benchmark ends: one JSON line, with what made it."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from flexgen_ray.report import environment


def finish(result: dict, device: str, path: Path | None) -> None:
    """Emits the result with hardware, versions, command and date."""
    emit(environment(device) | result, path)


def emit(result: dict, path: Path | None) -> None:
    """Prints a whole result as one line, and writes it if asked."""
    typer.echo(json.dumps(result))
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
