"""The step that runs this checkout's tests for GPUs. Knows pytest; not what the tests say."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexgen_ray.qualification.setting import Figures, Setting, Skipped, run_step
from flexgen_ray.qualification.steps import package_root

_MARK = "mark.gpu"
_MOST_FAILURES = 5
_MOST_WORKERS = 6


class Outcomes:
    """Plugin of pytest that leaves a figure as soon as a test has ended."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test's own outcome, and that of a fixture unless it passed."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        test = {"test": report.nodeid, "outcome": report.outcome}
        self._figures.add(**test, seconds=round(report.duration, 2))


def gpu_tests(setting: Setting, figures: Figures) -> None:
    """Run the tests that are marked `gpu`, several at a time where there are cores."""
    if not find_spec("pytest") or not find_spec("hypothesis"):
        raise Skipped("pytest and hypothesis, which the tests need, are not installed")
    import pytest

    files = _files([package_root(), Path.cwd()])
    if not files:
        raise Skipped("there is no checkout with tests/ here")
    arguments = ["-q", "-m", "gpu", "--maxfail", str(_MOST_FAILURES), "-p", "no:cacheprovider"]
    arguments.append("--continue-on-collection-errors")
    workers = min(_MOST_WORKERS, (os.cpu_count() or 1) // 2)
    if find_spec("xdist") and setting.on_cuda and workers > 1:
        arguments += ["-n", str(workers)]
    outcomes = Outcomes(figures)
    # The project's own options include some of plugins that this machine may lack.
    status = pytest.main([*arguments, "-o", "addopts=", *map(str, files)], plugins=[outcomes])
    if status == 0 and not outcomes.counts["passed"]:
        raise Skipped(f"all {outcomes.counts['skipped']} tests were skipped: no CUDA device")
    figures.add(**outcomes.counts)
    raise SystemExit(int(status))


def _files(roots: list[Path]) -> list[Path]:
    """Test files with such tests, in the first of these checkouts that has some."""
    for root in roots:
        files = sorted((root / "tests").glob("test_*.py"))
        if marked := [path for path in files if _MARK in path.read_text(encoding="utf-8")]:
            return marked
    return []


if __name__ == "__main__":
    run_step(gpu_tests)
