"""Progress bars on standard error: requests with tokens/s and stages lost, or named steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flexgen_ray.events import Progress as Pass


@contextmanager
def progress_bar(num_requests: int) -> Iterator[Callable[[int, Pass], None]]:
    """Yields a function to call with the requests done so far and each pass.

    Until its first call the weights are being loaded.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests, {task.fields[tokens]} tokens, {task.fields[rate]:.1f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started: float | None = None
    tokens = 0
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("loading weights", total=num_requests, tokens=0, rate=0.0)

        def advance(done: int, step: Pass) -> None:
            nonlocal started, tokens
            if step.note:
                bar.console.print(step.note, highlight=False)
                return
            now = time.monotonic()
            started = now - step.seconds if started is None else started
            tokens += step.new_tokens
            rate = tokens / max(now - started, 1e-9)
            bar.update(task, description="generating", completed=done, tokens=tokens, rate=rate)

        yield advance
        bar.update(task, completed=num_requests)


@contextmanager
def steps_bar(num_steps: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with the name of each step as it begins."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=num_steps)
        begun = 0

        def begin(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, completed=begun)
            begun += 1

        yield begin
        bar.update(task, description="done", completed=num_steps)
