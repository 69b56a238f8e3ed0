"""The result of a qualification: all steps' lines with hardware, versions, command and date.

Knows lines; not what a step asks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import write_text
from flexgen_ray.qualification.setting import Setting
from flexgen_ray.reporting.report import environment

RESULT = "result.json"
# Figures of a step that a person wants to see at once.
_HEADLINES = ("generated_tokens_per_s", "decode_tokens_per_s", "fraction_of_bound")


def save_result(setting: Setting, lines: list[dict]) -> Path:
    """Write the result of the steps that have ended; returns its path."""
    statuses = [line["status"] for line in lines]
    result: dict[str, Any] = environment(_device_name(lines) or setting.device)
    result |= {
        "tiny": setting.is_tiny,
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        "steps": lines,
    }
    path = setting.folder / RESULT
    write_text(path, to_json(result, indent=2) + "\n")
    return path


def describe(line: dict) -> str:
    """The end of a step in one line for people."""
    seconds = f", {line['seconds']:.0f} s" if "seconds" in line else ""
    reason = f": {line['reason']}" if "reason" in line else ""
    headlines = [
        f"{figures[name]:.4g} {name.replace('_', ' ')}"
        for figures in line.get("figures", [])
        for name in _HEADLINES
        if name in figures
    ]
    return f"{line['step']}: {line['status']}{seconds}{reason}" + "".join(
        f", {each}" for each in headlines
    )


def _device_name(lines: list[dict]) -> str | None:
    """The device's name as the probe found it; None if there was no probe."""
    names = (figures.get("device_name") for line in lines for figures in line.get("figures", []))
    return next(filter(None, names), None)
