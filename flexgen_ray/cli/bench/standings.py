"""Standings of a contest: each contestant's best throughput, our ratio to it, equal tokens."""

from __future__ import annotations

from statistics import median

from rich.table import Table

from flexgen_ray.calibration.steady import name_disturbance
from flexgen_ray.cli.bench.peer_task import OURS, PeerRun
from flexgen_ray.cli.bench.runs import mark
from flexgen_ray.units import format_bytes


def reference(runs: list[PeerRun]) -> PeerRun | None:
    """Run whose tokens are the reference: transformers', else the first run that finished."""
    finished = [run for run in runs if run.error is None]
    return next((run for run in finished if run.peer == "transformers"), next(iter(finished), None))


def mismatches(run: PeerRun, right: PeerRun) -> list[tuple[int, int]]:
    """Position (prompt, token) of the first different token of each sequence that differs.

    Only prompts that both answered are compared.
    """
    differences = []
    for index, (ours, theirs) in enumerate(zip(run.tokens, right.tokens, strict=False)):
        differs = [a != b for a, b in zip(ours, theirs, strict=True)]
        if any(differs):
            differences.append((index, differs.index(True)))
    return differences


def standings(runs: list[PeerRun]) -> list[dict]:
    """One entry for each contestant: its runs, its best set-up by median, our ratio to that.

    Throughput is generated tokens per second of prefill and decode. `ratio` is our throughput over
    the contestant's, None if either has none; `error` is its first error.
    """
    right = reference(runs)
    entries = [_entry(peer, runs, right) for peer in dict.fromkeys(run.peer for run in runs)]
    ours = next((entry["best"] for entry in entries if entry["peer"] == OURS), None)
    for entry in entries:
        if ours is not None and entry["best"] is not None:
            entry["ratio"] = round(ours["tokens_per_s"] / entry["best"]["tokens_per_s"], 3)
    return entries


def table(entries: list[dict]) -> Table:
    """Table of the standings for people: a row for each contestant and set-up."""
    shown = Table(title="generated tokens/s, prefill and decode; median of the runs")
    for heading in ("contestant", "batch", "tokens/s", "ours / theirs", "peak RSS", "same tokens"):
        shown.add_column(heading, justify="left" if heading == "contestant" else "right")
    for entry in entries:
        for setup, rate in entry["tokens_per_s"].items():
            same = [it for it in entry["runs"] if _words(it["batch_size"], it["experts"]) == setup]
            finished = [run for run in same if run["error"] is None]
            first = finished[0]
            is_best = rate == entry["best"]["tokens_per_s"]
            shown.add_row(
                entry["peer"],
                setup,
                f"{rate:.2f}",
                f"{entry['ratio']:.2f}" if is_best and entry["ratio"] else "",
                format_bytes(max(run["peak_rss_bytes"] for run in finished)),
                f"{first['equal_sequences']} of {first['compared_sequences']}",
                style="bold" if is_best else None,
            )
        if entry["error"]:
            shown.add_row(entry["peer"], "", "failed", "", "", "")
    return shown


def _words(batch_size: int | None, experts: str | None) -> str:
    size = "policy" if batch_size is None else str(batch_size)
    return size if experts is None else f"{size} {experts}"


def _entry(peer: str, runs: list[PeerRun], right: PeerRun | None) -> dict:
    mine = [run for run in runs if run.peer == peer]
    finished = [run for run in mine if run.error is None]
    rates: dict[tuple[int | None, str | None], list[float]] = {}
    for run in finished:
        rates.setdefault((run.batch_size, run.experts), []).append(run.tokens_per_s)
    medians = {setup: round(median(several), 3) for setup, several in rates.items()}
    best = max(medians, key=lambda setup: medians[setup], default=(None, None))
    return {
        "peer": peer,
        "error": next((run.error for run in mine if run.error), None),
        "tokens_per_s": {_words(*setup): rate for setup, rate in medians.items()},
        "best": _setup(*best) | {"tokens_per_s": medians[best]} if medians else None,
        "ratio": None,
        "details": finished[-1].details if finished else {},
        "runs": [_run(run, right) for run in mine],
    }


def _setup(batch_size: int | None, experts: str | None) -> dict:
    return {"batch_size": batch_size, "experts": experts}


def _run(run: PeerRun, right: PeerRun | None) -> dict:
    if run.error or right is None:
        return {
            **_setup(run.batch_size, run.experts),
            "peak_cgroup_bytes": run.peak_cgroup_bytes,
            "error": run.error,
        }
    different, compared = mismatches(run, right), min(len(run.tokens), len(right.tokens))
    return {
        **_setup(run.batch_size, run.experts),
        "seconds": round(run.seconds, 3),
        "tokens_per_s": round(run.tokens_per_s, 3),
        "load_s": round(run.load_seconds, 3),
        "cores_elsewhere": round(run.cores_elsewhere, 2),
        **mark(name_disturbance(run.cores_elsewhere)),
        "peak_rss_bytes": run.peak_rss_bytes,
        "peak_gpu_bytes": run.peak_gpu_bytes,
        "peak_cgroup_bytes": run.peak_cgroup_bytes,
        "sequences": len(run.tokens),
        "compared_sequences": compared,
        "equal_sequences": compared - len(different),
        "first_differences": different,
        "error": None,
    }
