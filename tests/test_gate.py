"""Doubtful runs: what makes one doubtful, and that none comes out unmarked or is compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import choice, gate, scaling
from flexgen_ray.calibration.steady import name_disturbance, processor_seconds
from flexgen_ray.cli.bench.runs import holds, mark
from flexgen_ray.cli.bench.scaling import RATES, compare_with_copies, table
from flexgen_ray.reporting import plot

OTHERS = ["others used 0.8 of 2 cores"]
BURN = "import time\nwhile time.process_time() < 0.4: pass\nprint(1)"
WITH_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
# This parent ends at once, so the process that burns is no descendant of ours.
WITH_ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
rates = st.none() | st.floats(0.1, 100)
stage_runs = st.dictionaries(
    st.sampled_from("124"),
    st.fixed_dictionaries(
        {"decode_tokens_per_s": rates, "generation_tokens_per_s": st.floats(0.1, 100)},
        optional={"doubtful": st.just(OTHERS)},
    ),
    min_size=1,
)


@pytest.mark.parametrize(("script", "is_ours"), [(WITH_CHILD, True), (WITH_ORPHAN, False)])
def test_what_our_processes_start_is_ours_even_when_ended(script, is_ours):
    before = processor_seconds([os.getpid()])
    command = [sys.executable, "-c", script, BURN]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # waits for the orphan too
    assert done.stdout == b"1\n"
    seconds = processor_seconds([os.getpid()]) - before
    assert seconds >= 0.39 if is_ours else seconds < 0.39


def test_a_tenth_of_the_cores_is_not_much(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert name_disturbance(0.2) == [] and name_disturbance(0.8) == OTHERS


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0.5, 1.1), st.floats(0.5, 1.5)), min_size=3),
    st.floats(0.7, 1.0),
)
def test_a_run_without_a_mark_was_undisturbed_busy_and_as_predicted(outcomes, share):
    left = list(outcomes)

    def run() -> dict:
        disturbed, busy, rate = left.pop(0)
        figures = {"cores_elsewhere": 0.0, "predicted_busy_share": share}
        figures |= {"busy_share_of_stages": [busy, 0.1]}
        for phase in RATES:
            figures |= {f"{phase}_tokens_per_s": rate, f"predicted_{phase}_tokens_per_s": 1.0}
        return figures | mark(OTHERS if disturbed else [])

    figures = gate.attempt(run, scaling.judge)
    seen = outcomes[: len(outcomes) - len(left)]
    sound = [not it[0] and 0.9 * share <= it[1] <= 1.02 and abs(it[2] - 1) <= 0.15 for it in seen]
    assert holds(figures) == any(sound) and not any(sound[:-1])
    assert len(seen) == 3 or sound[-1]
    if not holds(figures):
        shown = re.findall(r"[\d.]+", " ".join(figures["doubtful"]))
        assert figures["doubtful"] and shown


def test_a_run_that_takes_long_is_not_repeated_and_one_without_a_watch_is_an_error(monkeypatch):
    monkeypatch.setattr(gate, "PATIENCE", 0.0)
    runs = iter([{"cores_elsewhere": 0.8} | mark(OTHERS)])
    assert gate.attempt(lambda: next(runs))["doubtful"] == OTHERS
    with pytest.raises(AssertionError, match="nobody watched"):
        gate.attempt(dict)


@given(stage_runs)
def test_only_runs_without_a_mark_are_compared(runs):
    ratios = compare_with_copies(runs)
    for name, of in ratios.items():
        assert holds(runs["1"]), name
        assert all(holds(runs[count]) for count in of)
    assert bool(ratios) == ("1" in runs and holds(runs["1"]))
    heading, *rows = table(runs)
    assert heading.split().count("copies") == 2
    for count, row in zip(runs, rows, strict=False):
        cells = row.split()
        compared = [*cells[3:5], *cells[6:8]]
        if not holds(runs[count]):
            assert compared == ["-"] * 4 and cells[5].endswith("?")
            assert any(f"stages {count}" in line and OTHERS[0] in line for line in rows)


def test_the_plot_compares_only_runs_without_a_mark(monkeypatch, tmp_path):
    texts: list[list[str]] = []

    def look(figure, path) -> None:
        found = [it.get_text() for axes in figure.axes for it in axes.texts]
        found += [it.get_label() for axes in figure.axes for it in axes.lines]
        texts.append(found)

    monkeypatch.setattr(plot, "_save", look)
    run = {"decode_tokens_per_s": 4.0, "generation_tokens_per_s": 2.0}
    faster = {"decode_tokens_per_s": 16.0, "generation_tokens_per_s": 3.9}
    for doubtful in ("none", "1", "2"):
        runs = {"1": run, "2": faster}
        if doubtful != "none":
            runs[doubtful] = runs[doubtful] | mark(OTHERS)
        result = {"models": {"opt-6m": {"stages": runs} | compare_with_copies(runs)}}
        plot.draw_scaling(result, tmp_path / "it.png")
    sound, without_one, without_two = texts
    assert "16\n2.00 x copies" in sound and "3.9\n0.97 x copies" in sound
    assert sound.count("independent copies") == 2 and "doubtful" not in sound
    for marked in (without_one, without_two):
        assert marked.count("doubtful") == 2 and "x copies" not in " ".join(marked)
    assert "independent copies" not in without_one


@pytest.mark.parametrize(("rests_on", "is_refused"), [(None, True), ([{"a": [1]}], False)])
def test_no_file_rests_on_a_doubtful_run(tmp_path, capsys, rests_on, is_refused):
    result = {"models": [{"runs": {"1": {"rate": 4.2} | mark(OTHERS)}}]}
    path = tmp_path / "result.json"
    if is_refused:
        with pytest.raises(typer.Exit) as end:
            gate.finish(result, "none", path, rests_on)
        assert end.value.exit_code == 1
    else:
        gate.finish(result, "none", path, rests_on)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["models"] == result["models"]
    assert f"doubtful: models 0, runs, 1: {OTHERS[0]}" in shown.err
    assert path.exists() != is_refused and ("is not written" in shown.err) == is_refused


def test_the_fastest_run_is_one_that_holds_if_there_is_any(monkeypatch):
    planned = {4: {"decode_tokens_per_s": 9.0} | mark(OTHERS), 5: {"decode_tokens_per_s": 7.0}}
    monkeypatch.setattr(scaling, "_planned_run", lambda config, stages, each, most: planned[each])
    best = scaling._fastest_run(None, 4, [4, 5], 64)
    assert holds(best) and best["blocks_tried"] == {"4": OTHERS, "5": 7.0}
    assert not holds(scaling._fastest_run(None, 4, [4], 64))


def test_the_choice_is_compared_with_no_doubtful_run():
    def run(measured: float, predicted: float, *doubts: str) -> dict:
        rates = {"measured_tokens_per_s": measured, "predicted_tokens_per_s": predicted}
        return rates | {"measured_to_predicted": measured / predicted} | mark([*doubts])

    slow, fast, chosen = run(1.0, 1.0), run(4.0, 4.2), run(5.0, 5.0)
    summary = choice._summary([slow, fast], chosen)
    assert (summary["chosen_to_best_of_grid"], summary["best_to_worst_of_grid"]) == (1.25, 4.0)
    # A disturbed run that would have been the best may not make the choice look better.
    held_up = run(2.0, 6.0, *OTHERS)
    summary = choice._summary([slow, fast, held_up], chosen)
    assert summary["chosen_to_best_of_grid"] is None and summary["largest_error"] > 0.6
