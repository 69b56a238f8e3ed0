"""Progress on standard error: plain lines without a terminal, a bar that counts tokens on one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from flexgen_ray.config import Policy, Workload
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.llm import LLM
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.planner.pipeline_plan import PipelinePlan, PlannedJob
from flexgen_ray.reporting.progress import (
    LINE_SECONDS,
    Lines,
    show_progress,
    show_steps,
    track,
    with_progress,
)
from flexgen_ray.reporting.tally import ProgressTracker
from flexgen_ray.request import Finished, Request, SamplingParams
from flexgen_ray.runtime.events import Progress, Recovery, RunCounts
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.units import format_seconds

LINE = re.compile(r"\d\d:\d\d:\d\d (.*)\n")
WAITING = """
import time
from flexgen_ray.runtime.events import Progress, RunCounts
from flexgen_ray.reporting.progress import show_progress
with show_progress() as show:
    show(Progress(phase="waiting for room"))
    time.sleep(2.2)
    show(Progress(new_tokens=3, standing=RunCounts(1, 4, 30, 20, 100, 7.5, 7200.0)))
    show(Progress(note="stage 1 [was] replaced"))
    input()
"""


def lines_of(times_and_events):
    """[(time, text)] of what Lines writes, ticked twice a second."""
    now, written = [0.0], []
    lines = Lines(lambda line: written.append((now[0], line)), clock=lambda: now[0])
    for seconds, event in times_and_events:
        for _ in range(round(2 * seconds)):
            now[0] += 0.5
            lines.tick()
        lines(event)
    found = [(at, LINE.fullmatch(line)) for at, line in written]
    assert all(match for _, match in found)
    return [(at, match[1]) for at, match in found]


PHASES = st.sampled_from(["loading weights", "tokenizing", "planning"])
EVENTS = st.one_of(
    st.builds(Progress, phase=PHASES, done=st.integers(0, 5), total=st.just(5)),
    st.builds(Progress, new_tokens=st.just(1), is_prefill=st.booleans()),
)


@given(st.lists(st.tuples(st.floats(0, 40), EVENTS), min_size=1, max_size=20))
def test_the_first_line_comes_at_once_and_then_one_every_30_seconds_or_a_new_phase(timed):
    found = lines_of(timed)
    assert found[0][1].startswith(timed[0][1].current_phase)
    assert found[0][0] <= timed[0][0] + 0.5
    told = {found[0][1].partition(":")[0].partition(" (")[0]}
    for (before, _), (at, text) in zip(found, found[1:], strict=False):
        phase = text.partition(":")[0].partition(" (")[0]
        assert phase not in told or at - before >= LINE_SECONDS
        told.add(phase)
    last = found[-1][0]
    assert sum(round(2 * seconds) / 2 for seconds, _ in timed) - last < LINE_SECONDS + 1


def test_phases_shorter_than_a_second_get_no_line_of_their_own():
    flicker = [(0.5, Progress(is_prefill=number % 2 == 0)) for number in range(200)]
    found = lines_of([(0.0, Progress(phase="starting")), *flicker])
    assert 4 <= len(found) <= 7


def test_a_pipe_gets_whole_lines_while_the_command_still_runs():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr and process.stdin
    read = [process.stderr.readline() for _ in range(4)]
    assert process.poll() is None
    process.communicate("\n", timeout=60)
    said = [LINE.fullmatch(line)[1] for line in read]
    assert said[0] == "starting" and said[1].startswith("waiting for room (1")
    assert said[2] == "stage 1 [was] replaced"
    assert said[3] == (
        "decode: 1 of 4 requests, 30 prompt and 20 new tokens (50% of at most 100), "
        "7.5 new tokens/s, about 2.0 h left"
    )


def test_a_terminal_gets_a_bar_of_tokens():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdin=subprocess.PIPE, stderr=theirs, text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
    )  # fmt: skip
    os.close(theirs)
    shown, until = "", time.monotonic() + 60
    while "50%" not in shown and time.monotonic() < until:
        shown += os.read(ours, 4096).decode(errors="replace")
    process.communicate("\n", timeout=60)
    assert "waiting for room" in shown and "decode" in shown and "about 2.0 h left" in shown
    assert "stage 1 [was] replaced" in shown
    assert not LINE.search(shown)


def test_counted_items_are_those_that_come():
    seen = []
    assert list(track("abc", seen.append, "reading", "lines")) == ["a", "b", "c"]
    assert [(event.current_phase, event.done) for event in seen] == [
        ("reading", number) for number in range(4)
    ]


def test_steps_and_what_cannot_say_how_far_it_is_get_lines_too(capfd):
    with show_steps("quantizing", 3) as begin:
        begin("layer 0")
        begin("layer 1")
        time.sleep(1.7)
    said = LINE.findall(capfd.readouterr().err)
    assert said[0] == "quantizing" and len(said) == 1
    with_progress(lambda seconds: time.sleep(seconds), "bench lanes")(seconds=0)
    assert LINE.findall(capfd.readouterr().err) == ["bench lanes"]


def test_amounts_are_told_in_their_units(capfd):
    with show_progress() as show:
        show(Progress(phase="loading weights", done=2**30, total=2**32, unit="bytes"))
        time.sleep(1.7)
    said = capfd.readouterr().err
    assert re.search(r"loading weights: 1.0 GiB of 4.0 GiB \(25%\), about \d+(\.\d)? s left", said)


def test_generate_shows_progress_only_when_asked(text_model, capfd):
    seen: list[Progress] = []
    with LLM(
        text_model, dtype="float32", device="cpu", use_ray=False, cpu_memory="64MiB",
        gpu_memory="64MiB", on_progress=seen.append,
    ) as llm:  # fmt: skip
        llm.generate(["Hello", "there"], SamplingParams(max_tokens=3))
        assert capfd.readouterr().err == ""
        phases = list(dict.fromkeys(event.current_phase for event in seen if not event.note))
        assert phases == ["tokenizing", "planning", "loading weights", "prefill", "decode"]
        notes = [event.note for event in seen if event.note]
        assert (
            len(notes) == 1
            and "isn't calibrated, so memory is filled in order of speed" in notes[0]
        )
        last = seen[-1].standing
        assert last and (last.requests_done, last.new_tokens, last.seconds_left) == (2, 6, 0)
        count = len(seen)
        llm.chat([{"role": "user", "content": "Hi"}], errors="return", use_tqdm=True)
        llm.generate("Hello", SamplingParams(max_tokens=3), use_tqdm=True)
        assert len(LINE.findall(capfd.readouterr().err)) == 2 and len(seen) == count


REQUESTS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 29)), min_size=1, max_size=30
)


@given(REQUESTS)
def test_a_tally_ends_with_nothing_left_and_its_bound_never_grows(lengths):
    requests = [
        Request(i, [1] * prompt, SamplingParams(max_tokens=most))
        for i, (prompt, most, _) in enumerate(lengths)
    ]

    def run():
        for request, (_, most, early) in zip(requests, lengths, strict=True):
            count = max(most - early, 1)
            yield Progress(1, len(request.prompt_token_ids), 0.5, True)
            for _ in range(count - 1):
                yield Progress(1, 0, 0.1)
            yield Finished(request.index, [7] * count, "stop")
        yield Progress(0, 0, 0.0)

    standings: list[RunCounts] = []
    tally = ProgressTracker(requests)
    done = list(tally.follow(run(), lambda event: standings.append(event.standing)))
    assert len(done) == len(requests)
    bounds = [it.most_tokens for it in standings]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == sum(prompt + most for prompt, most, _ in lengths)
    last = standings[-1]
    assert last.tokens == last.most_tokens and last.requests_done == len(requests)
    assert last.seconds_left == 0


def planned(prefill: float, decode: float) -> PipelinePlan:
    """A plan of one block of 8 requests of 20 + 10 tokens."""
    config = shape_config("opt-125m")
    stage = StagePlan(
        config, StageLayers.whole(config.num_layers), Policy(4, 2), Workload(8, 20, 30), "float32"
    )
    seconds = {"prefill": {"device": prefill}, "decode": {"device": decode}}
    return PipelinePlan(PlannedJob.uniform(8, 20, 10), [stage], [seconds], 1.0)


def test_time_left_is_the_plans_before_a_token_is_there_and_the_runs_after():
    plan = planned(prefill=20.0, decode=100.0)
    requests = [Request(i, [1] * 20, SamplingParams(max_tokens=10)) for i in range(8)]
    seen: list[RunCounts] = []

    def run(slower: float):
        yield Progress(8, 160, 20.0 * slower, True)
        for _ in range(4):
            yield Progress(8, 0, 100.0 * slower)

    for slower in (1.0, 3.0):
        seen.clear()
        list(
            ProgressTracker(requests, plan).follow(
                run(slower), lambda event: seen.append(event.standing)
            )
        )
        assert abs(seen[0].seconds_left - plan.block_seconds) < 1e-6
        # Five of ten tokens of each are there; the first came with its prompt.
        left = plan.decode_seconds / 2 * slower
        assert abs(seen[-1].seconds_left / left - 1) < 0.15
    unknown = ProgressTracker(requests).standing()
    assert unknown.seconds_left is None


def test_durations_have_two_digits_or_more():
    assert [format_seconds(it) for it in (0.42, 4.2, 42, 420, 11520, 669_600)] == [
        "0.42 s", "4.2 s", "42 s", "7 min", "3.2 h", "186 h",
    ]  # fmt: skip


def test_a_recovery_tells_what_took_how_long():
    recovery = Recovery("stage 1 lost its process", [1], 0.0, 2.04, 0.5)
    told = "stage 1 replaced (stage 1 lost its process): restart 2.0 s, weights 0.5 s"
    assert recovery.line() == told
    recovery.prefill_seconds = 0.25
    assert recovery.line() == f"{told}, prefill 0.2 s"
