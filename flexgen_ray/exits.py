"""How a job ends: its exit status, and what is said of going on. Knows the output alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from flexgen_ray.signals import EXIT_STOPPED

if TYPE_CHECKING:
    from flexgen_ray.io.journal import Journal

EXIT_REFUSALS = 2


@contextmanager
def told_how_to_resume(journal: Journal) -> Iterator[None]:
    """For a job that is stopped, by a signal or an error, while answers are there."""
    try:
        yield
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        if journal.can_resume and journal.answered:
            typer.echo(
                f"{len(journal.answered)} lines are answered in {journal.path}; the same command, "
                "without --overwrite, goes on from there",
                err=True,
            )
        if isinstance(error, KeyboardInterrupt):
            typer.echo("flexgen-ray: stopped", err=True)
            raise typer.Exit(EXIT_STOPPED) from error
        raise


def exit_status(journal: Journal) -> None:
    """Ends the command with status 2 if a line, of this run or an earlier one, has an error row."""
    if journal.first_refusal is not None:
        custom_id, message = journal.first_refusal
        typer.echo(
            f"{journal.num_refusals} lines got an error row, the first {custom_id}: {message}",
            err=True,
        )
        raise typer.Exit(EXIT_REFUSALS)
