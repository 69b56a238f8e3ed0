"""The end of every benchmark and evaluation: one JSON line, with the environment of the run."""

from __future__ import annotations

from pathlib import Path

from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import write_text
from flexgen_ray.reporting.report import environment
from flexgen_ray.reporting.terminal import display

NEAR = 0.15  # relative error up to which a prediction counts as near


def prediction_errors(runs: list[dict]) -> dict:
    """Summarize the errors of predictions; each run has "measured_to_predicted", a ratio."""
    off = [abs(run["measured_to_predicted"] - 1) for run in runs]
    return {
        "policies": len(off),
        f"predicted_within_{NEAR:.0%}": sum(it <= NEAR for it in off),
        "largest_error": round(max(off), 4),
    }


def finish(result: dict, device: str, path: Path | None) -> None:
    """Print the result as `emit` does, with hardware, versions, command and date added."""
    emit(environment(device) | result, path)


def emit(result: dict, path: Path | None) -> None:
    """Print the result as one JSON line, and write it to a file if `path` is given."""
    display(to_json(result))
    if path is not None:
        write_text(path, to_json(result, indent=2) + "\n")
