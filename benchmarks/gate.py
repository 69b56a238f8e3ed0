"""Judges emulated runs: what can't be trusted is repeated, then marked, and no file rests on it.

A run is doubtful if other processes used the cores beside it, if its busiest lane was idle for much
longer than its plan predicts or busy for longer than the run, or if it misses that plan's
throughput. Its figures then have a list of sentences, `doubtful`, as those of `flexgen-ray bench`
do. Knows figures and marks; no benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from flexgen_ray.cli.bench.runs import holds, mark
from flexgen_ray.reporting import result as reporting
from flexgen_ray.reporting.terminal import say

LEAST_BUSY = 0.9  # share of its predicted time for which the busiest lane is busy at least
MOST_BUSY = 1.02  # of the time; ops at its ends count whole
ATTEMPTS = 3
PATIENCE = 300.0  # seconds after which no further attempt begins


def attempt(run: Callable[[], dict], judge: Callable[[dict], list[str]] = lambda run: []) -> dict:
    """Figures of the first run without a doubt, else of the least doubtful one, marked.

    It is repeated up to ATTEMPTS times, while all of them took less than PATIENCE. run: returns
    figures with those of `beside` among them. judge: returns what else makes figures doubtful.
    """
    tried: list[dict] = []
    began = time.perf_counter()
    while True:
        figures = run()
        assert "cores_elsewhere" in figures, "nobody watched what other processes did"
        doubts = figures.pop("doubtful", []) + judge(figures)
        tried.append(figures | mark(doubts))
        if not doubts or len(tried) >= ATTEMPTS or time.perf_counter() - began > PATIENCE:
            return min(tried, key=lambda it: len(it.get("doubtful", ())))
        say(f"doubtful, so run again: {'; '.join(doubts)}")


def off_pace(busy: float, predicted: float = 1.0) -> list[str]:
    """The doubt about a run whose busiest lane was busy for too little of the time, or too much.

    busy: that lane's modelled seconds over the run's; more than 1 means that the emulation ran
    faster than the hardware could. predicted: the same, by the run's plan.
    """
    if LEAST_BUSY * predicted <= busy <= MOST_BUSY:
        return []
    return [f"the busiest lane was busy {busy:.2f} of the time, where {predicted:.2f} is predicted"]


def missed(what: str, measured: float | None, predicted: float) -> list[str]:
    """The doubt about a figure that is far from its prediction, if it is. None is not measured."""
    if measured is None or abs(measured / predicted - 1) <= reporting.NEAR:
        return []
    ratio = measured / predicted
    return [f"{what}: {measured:.4g}, which is {ratio:.2f} of the predicted {predicted:.4g}"]


def ratio(run: dict, other: dict, name: str, digits: int = 4) -> float | None:
    """A figure of a run as a multiple of another's; None if either is marked."""
    if not (holds(run) and holds(other)):
        return None
    return round(run[name] / other[name], digits)


def marks(result: object, place: str = "") -> Iterator[tuple[str, list[str]]]:
    """(place in the result, its doubts) of every mark."""
    if isinstance(result, dict):
        if not holds(result):
            yield place or "the run", result["doubtful"]
        for name, value in result.items():
            yield from marks(value, f"{place}, {name}" if place else str(name))
    elif isinstance(result, list):
        for number, value in enumerate(result):
            yield from marks(value, f"{place} {number}")


def finish(result: dict, device: str, path: Path | None, rests_on: object = None) -> None:
    """End a benchmark as reporting.result does, and say on the terminal which runs are doubtful.

    rests_on: parts of the result on which the claim rests; None for all of it. If there are marks
    in these, the figures are printed but not written to the file, and the exit status is 1.
    """
    for place, doubts in marks(result):
        say(f"doubtful: {place}: {'; '.join(doubts)}")
    count = len(list(marks(result if rests_on is None else rests_on)))
    is_refused = path is not None and count > 0
    reporting.finish(result, device, None if is_refused else path)
    if is_refused:
        say(
            f"{path} is not written, because {count} of the runs that it rests on are doubtful; "
            "end other programs on this machine, and run it again"
        )
        raise typer.Exit(1)
