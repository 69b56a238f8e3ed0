"""What the bar on standard error shows besides the bar."""

from __future__ import annotations

from flexgen_ray.events import Progress, Recovery
from flexgen_ray.progress import progress_bar


def test_a_lost_stage_gets_a_line_and_loading_is_shown_before(capfd):
    with progress_bar(2) as advance:
        pass
    loading = capfd.readouterr().err
    assert "loading weights" in loading and "generating" not in loading
    with progress_bar(2) as advance:
        advance(0, Progress(3, 5, 0.1, True))
        advance(1, Progress(note="stage 1 lost its process; to be replaced"))
        advance(1, Progress(2, 0, 0.1))
    shown = capfd.readouterr().err
    assert "stage 1 lost its process; to be replaced\n" in shown
    assert "5 tokens" in shown and "generating" in shown


def test_a_recovery_tells_what_took_how_long():
    recovery = Recovery("stage 1 lost its process", [1], 0.0, 2.04, 0.5)
    told = "stage 1 replaced (stage 1 lost its process): restart 2.0 s, weights 0.5 s"
    assert recovery.line() == told
    recovery.prefill_seconds = 0.25
    assert recovery.line() == f"{told}, prefill 0.2 s"
