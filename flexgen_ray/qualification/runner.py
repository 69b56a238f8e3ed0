"""Runs the steps of a qualification one after the other, and writes what each of them ended with.

A step begins only if enough time and memory is left for it, and its failure stops no later one.
Each leaves a line in STEPS, which is on disk before the next one begins. Knows steps; not their
subjects.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from flexgen_ray.files.jsonl_file import JsonlFile
from flexgen_ray.hardware.host import free_memory
from flexgen_ray.qualification.processes import Ended, run_limited
from flexgen_ray.qualification.setting import read_figures
from flexgen_ray.qualification.steps import Step, package_root
from flexgen_ray.units import format_bytes

STEPS = "steps.jsonl"
PASSED, FAILED, KILLED, SKIPPED = "passed", "failed", "killed", "skipped"
_TAIL_BYTES = 2000  # of a failed step's output that its line holds
# For the end of a killed step and for the result after the last one.
_END_SECONDS = 5
# Steps find this checkout, look for no model on the network and report nothing.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}


def run_steps(
    steps: Sequence[Step], folder: Path, seconds: float, on_begin: Callable[[str], None]
) -> Iterator[dict]:
    """Run all steps within so many seconds; yields the line of each as soon as it is on disk.

    folder: an existing folder, in which the steps leave their files. on_begin: called with the name
    of each step before it.
    """
    began = time.monotonic()
    with closing(JsonlFile(folder / STEPS)) as file:
        for step in steps:
            on_begin(step.name)
            begun = time.monotonic() - began
            line = {"step": step.name, "began_s": round(begun, 1)}
            line |= run_one(step, folder, seconds - begun)
            file.append(line)
            file.sync()
            yield line


def run_one(step: Step, folder: Path, left_s: float) -> dict[str, Any]:
    """Run one step; returns its status, seconds and figures.

    left_s: seconds left to this step and all later ones. A step that did not pass gives a reason,
    and the last of its output.
    """
    if reason := _reason_to_skip(step, left_s):
        return {"status": SKIPPED, "reason": reason}
    limit = min(step.limit_s, left_s - _END_SECONDS)
    log = folder / f"{step.name}.log"
    paths = [str(package_root()), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = _OFFLINE | {"PYTHONPATH": os.pathsep.join(paths)}
    ended = run_limited(step.command, limit, log, environment)
    line: dict[str, Any] = {
        "seconds": round(ended.seconds, 1),
        "command": " ".join(step.command[1:]),
        "figures": read_figures(folder / step.figures),
    }
    return _judge(ended, limit, line["figures"]) | line | _remains(ended, log)


def _reason_to_skip(step: Step, left_s: float) -> str | None:
    """A clause that says which time or memory a step lacks; None if it may begin."""
    if left_s - _END_SECONDS < step.least_s:
        return f"{max(left_s, 0):.0f} s left, and it needs {step.least_s:.0f} s"
    free = free_memory() if step.host_bytes else 0
    if free < step.host_bytes:
        needed = format_bytes(step.host_bytes)
        return f"{format_bytes(free)} of host memory free, and it needs {needed}"
    return None


def _judge(ended: Ended, limit: float, figures: list[dict]) -> dict[str, Any]:
    """A step's status, with the reason if it did not pass."""
    if ended.exit_status is None:
        return {"status": KILLED, "reason": f"it took more than {limit:.0f} s"}
    if ended.exit_status:
        return {"status": FAILED, "reason": f"exit status {ended.exit_status}"}
    reasons = [each["skipped"] for each in figures if set(each) == {"skipped"}]
    return {"status": SKIPPED, "reason": reasons[0]} if reasons else {"status": PASSED}


def _remains(ended: Ended, log: Path) -> dict[str, Any]:
    """The last output of a step that did not end well, and the number of killed processes."""
    remains: dict[str, Any] = {"killed_processes": ended.num_killed} if ended.num_killed else {}
    if ended.exit_status != 0:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            remains["tail"] = file.read().decode(errors="replace")
    return remains


def failures(lines: list[dict]) -> list[str]:
    """Names of the steps that failed or were killed."""
    return [line["step"] for line in lines if line["status"] in (FAILED, KILLED)]
