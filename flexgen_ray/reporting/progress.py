"""Progress on standard error: a bar on a terminal, plain lines elsewhere.

Knows progress events (runtime/events.py) and the time; not their sources.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from flexgen_ray.reporting.terminal import printable
from flexgen_ray.runtime.events import OnProgress, RunCounts
from flexgen_ray.runtime.events import Progress as Event
from flexgen_ray.units import format_bytes, format_seconds

LINE_SECONDS = 30  # between plain lines
PHASE_SECONDS = 1  # a new phase gets a line once it has lasted this long
TICK_SECONDS = 0.5

Item = TypeVar("Item")


@contextmanager
def show_progress(phase: str = "starting") -> Iterator[OnProgress]:
    """Context that shows progress; yields the function to call with every progress event.

    phase: name shown before the first event.
    """
    console = Console(stderr=True)
    is_live = console.is_terminal and not console.is_dumb_terminal
    with _bar(console) if is_live else _lines() as show:
        show(Event(phase=phase))
        yield show


def with_progress(command: Callable[..., None], phase: str) -> Callable[..., None]:
    """A command that shows its elapsed time, for work that reports no progress of its own."""

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        with show_progress(phase):
            command(*args, **options)

    return run


def track(
    items: Iterable[Item], show: OnProgress, phase: str, unit: str, total: int = 0
) -> Iterator[Item]:
    """Yield the items and show how many were taken, as `unit`; total: 0 if it is unknown."""
    show(Event(phase=phase, total=total, unit=unit))
    for number, item in enumerate(items, start=1):
        yield item
        show(Event(phase=phase, done=number, total=total, unit=unit))


@contextmanager
def show_steps(phase: str, num_steps: int) -> Iterator[Callable[[str], None]]:
    """Context of a task in steps; yields the function to call with the name of each new step."""
    begun = 0
    with show_progress(phase) as show:

        def begin(name: str) -> None:
            nonlocal begun
            show(Event(phase=phase, done=begun, total=num_steps, unit="steps", detail=name))
            begun += 1

        yield begin


class Lines:
    """Progress as plain lines, for logs and pipes.

    Writes a line for the first event, one every LINE_SECONDS, and one for each new phase that
    lasts. `tick` must be called regularly, from any thread.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._clock = write, clock
        self._lock = threading.Lock()
        self._event: Event | None = None
        self._began = self._last = 0.0
        self._shown: set[str] = set()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if event.note:
                self._say(event.note)
                return
            is_first = self._event is None
            if self._event is None or event.current_phase != self._event.current_phase:
                self._began = self._clock()
            self._event = event
            if is_first:
                self._write_progress()

    def tick(self) -> None:
        """Write a line if one is due."""
        with self._lock:
            if self._event is None:
                return
            now = self._clock()
            is_new = self._event.current_phase not in self._shown
            lasts = now - self._began >= PHASE_SECONDS
            if now - self._last >= LINE_SECONDS or (is_new and lasts):
                self._write_progress()

    def _write_progress(self) -> None:
        assert self._event is not None
        self._last = self._clock()
        self._shown.add(self._event.current_phase)
        self._say(f"{self._event.current_phase}{_describe(self._event, self._last - self._began)}")

    def _say(self, text: str) -> None:
        self._write(f"{time.strftime('%H:%M:%S')} {text}\n")


@contextmanager
def _lines() -> Iterator[OnProgress]:
    lines, is_over = Lines(_write), threading.Event()

    def tick() -> None:
        while not is_over.wait(TICK_SECONDS):
            lines.tick()

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        is_over.set()
        thread.join()


def _write(line: str) -> None:
    """Write the line in one piece and flush it; a closed standard error is ignored."""
    try:
        sys.stderr.write(printable(line))
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


@contextmanager
def _bar(console: Console) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, detail="")
        began, phase = 0.0, ""

        def show(event: Event) -> None:
            nonlocal began, phase
            if event.note:
                bar.console.print(
                    printable(event.note), highlight=False, markup=False, soft_wrap=True
                )
                return
            if event.current_phase != phase:
                began, phase = time.monotonic(), event.current_phase
            standing = event.standing
            done = standing.tokens if standing else event.done
            total = standing.most_tokens if standing else event.total
            detail = _describe(event, time.monotonic() - began)
            bar.update(task, description=phase, completed=done, total=total or None, detail=detail)

        yield show


def _describe(event: Event, seconds: float) -> str:
    """Text that follows the phase's name; seconds: time since the phase began."""
    if event.standing is not None:
        return f": {_describe_counts(event.standing)}"
    detail = f": {event.detail}" if event.detail else ""
    if event.unit == "bytes":
        amounts = format_bytes(event.done), format_bytes(event.total)
    else:
        amounts = f"{event.done:,.0f}", f"{event.total:,.0f}"
    if event.total:
        share = event.done / event.total
        left = f", {_left(seconds * (1 / share - 1))}" if share and seconds > PHASE_SECONDS else ""
        unit = "" if event.unit == "bytes" else f" {event.unit}"
        return f": {amounts[0]} of {amounts[1]}{unit} ({share:.0%}){left}{detail}"
    if event.done:
        return f": {amounts[0]} {event.unit}{detail}"
    return detail + (f" ({format_seconds(seconds)} so far)" if seconds > PHASE_SECONDS else "")


def _describe_counts(standing: RunCounts) -> str:
    most = "at most" if standing.is_bound else "about"
    parts = [
        f"{standing.requests_done:,} of {standing.num_requests:,} requests",
        f"{standing.prompt_tokens:,} prompt and {standing.new_tokens:,} new tokens "
        f"({standing.tokens / max(standing.most_tokens, 1):.0%} of {most} "
        f"{standing.most_tokens:,})",
        f"{standing.tokens_per_s:.3g} new tokens/s",
    ]
    if standing.seconds_left is not None:
        parts.append(_left(standing.seconds_left))
    return ", ".join(parts)


def _left(seconds: float) -> str:
    return f"about {format_seconds(seconds)} left"
