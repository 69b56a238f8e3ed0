"""How every benchmark ends: one JSON line, with what made it."""

from __future__ import annotations

from pathlib import Path

from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import write_text
from flexgen_ray.reporting.report import environment
from flexgen_ray.reporting.terminal import display

NEAR = 0.15  # how far a prediction may be off


def prediction_errors(runs: list[dict]) -> dict:
    """How far predictions were off; each run has its measured_to_predicted."""
    off = [abs(run["measured_to_predicted"] - 1) for run in runs]
    return {
        "policies": len(off),
        f"predicted_within_{NEAR:.0%}": sum(it <= NEAR for it in off),
        "largest_error": round(max(off), 4),
    }


def finish(result: dict, device: str, path: Path | None) -> None:
    """Emits the result with hardware, versions, command and date."""
    emit(environment(device) | result, path)


def emit(result: dict, path: Path | None) -> None:
    """Prints a whole result as one line, and writes it if asked."""
    display(to_json(result))
    if path is not None:
        write_text(path, to_json(result, indent=2) + "\n")
