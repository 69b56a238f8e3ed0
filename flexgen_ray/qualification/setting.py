"""Shared by the steps' processes: their options, the figures that they leave, and skipping.

Figures are lines of JSON, each on disk before the next question, so that a step that is killed has
left what it knew. Knows files; not what a step asks.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_ray.files.json_text import to_json
from flexgen_ray.reporting.terminal import display


class Skipped(Exception):
    """A step or question that can't be answered on this machine; the message says why."""


@dataclass(frozen=True)
class Setting:
    """Options of one step.

    device: cpu, cuda or cuda:N. folder: where all steps leave their files. is_tiny: shapes that
    take seconds on a CPU.
    """

    device: str
    folder: Path
    is_tiny: bool = False

    @property
    def on_cuda(self) -> bool:
        """True if the steps use a GPU."""
        return self.device.startswith("cuda")

    def arguments(self) -> list[str]:
        """Arguments from which `run_step` makes an equal setting."""
        words = ["--device", self.device, "--folder", str(self.folder)]
        return [*words, *(["--tiny"] if self.is_tiny else [])]


class Figures:
    """The figures of a step, a JSON line each, appended and flushed to disk one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **values: Any) -> None:
        """Append a line, and print it for the step's log."""
        line = to_json(values)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        display(line)


def read_figures(path: Path) -> list[dict]:
    """The objects in a file of JSON lines, or the one of a JSON file; without a torn line."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    with suppress(ValueError):
        whole = json.loads(text)
        return [whole] if isinstance(whole, dict) else []
    figures = []
    for line in text.splitlines():
        with suppress(ValueError):
            figures.append(json.loads(line))
    return [each for each in figures if isinstance(each, dict)]


def run_step(step: Callable[[Setting, Figures], None]) -> None:
    """Run a step with the options of the command line; its file of figures has its name."""
    parser = argparse.ArgumentParser(description=step.__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", dest="is_tiny")
    setting = Setting(**vars(parser.parse_args()))
    figures = Figures(setting.folder / f"{step.__name__}.jsonl")
    try:
        step(setting, figures)
    except Skipped as reason:
        figures.add(skipped=str(reason))
