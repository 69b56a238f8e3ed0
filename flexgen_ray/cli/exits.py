"""How a command ends: its exit status, and one sentence about what went wrong.

Exit status: 0 if every line was answered (or as many as --max-errors asks for), 1 if the command
could not run, 2 if more lines got an error row, 64 if it was called wrongly, 130 if it was stopped.
"""

from __future__ import annotations

import linecache
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from flexgen_ray.files.jsonl_file import OutputLost
from flexgen_ray.paths import user_cache_dir
from flexgen_ray.reporting.terminal import printable, say
from flexgen_ray.signals import EXIT_STOPPED, raise_on_stop, was_stopped

if TYPE_CHECKING:
    from flexgen_ray.batch.journal import Journal

EXIT_FAULT = 1
EXIT_REFUSALS = 2
EXIT_USAGE = 64
_PACKAGE = Path(__file__).parent.parent
_MAX_SENTENCE = 2000
# The base of all that typer raises of a wrong option; typer itself doesn't export it.
_UsageError: Any = typer.BadParameter.__bases__[0]


def run(command: Callable[..., Any]) -> NoReturn:
    """Runs a Typer app and ends the process with its exit status; a fault is said in one line."""
    raise_on_stop()
    try:
        status = command(standalone_mode=False)
    except SystemExit:
        raise
    except _UsageError as error:
        error.show()
        status = EXIT_USAGE
    except BaseException as error:
        status = EXIT_STOPPED
        if not _is_stop(error):
            say(f"flexgen-ray: error: {describe_error(error)}")
            status = EXIT_FAULT
    if status == EXIT_STOPPED:
        say("flexgen-ray: stopped")
    sys.exit(status or 0)


def describe_error(error: BaseException) -> str:
    """An error in one line; for one that nobody foresaw, with the name of its traceback's file."""
    text = re.sub(r"\s*\n\s*", " ", str(error).strip())[:_MAX_SENTENCE]
    if _explains_itself(error):
        return text
    name = type(error).__name__
    if isinstance(error, MemoryError):
        text = text or "there is not enough memory"
    if type(error) not in (RuntimeError, OSError, ValueError):
        text = f"{name}: {text}" if text else name
    return f"{text} (traceback: {_keep_traceback(error)})"


def _explains_itself(error: BaseException) -> bool:
    """True if an error was raised by this project, for users, or is the system's word on a file."""
    if not isinstance(error, ValueError | OSError | RuntimeError) or hasattr(error, "__notes__"):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    is_raised = linecache.getline(file, number).lstrip().startswith("raise ")
    return is_raised and Path(file).is_relative_to(_PACKAGE)


def _keep_traceback(error: BaseException) -> Path:
    """Writes it where the user's files of this project are, or else to a temporary file."""
    lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sys.argv}\n"]
    text = printable("".join(lines + traceback.format_exception(error)))
    try:
        folder = user_cache_dir() / "errors"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir())
    name = time.strftime("flexgen-ray-%Y%m%d-%H%M%S-")
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=folder, prefix=name, suffix=".txt", delete=False
    ) as file:
        file.write(text)
    return Path(file.name)


def _is_stop(error: BaseException | None) -> bool:
    """True if an error is a stop, or came while one was obeyed, as where a terminal has gone."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None or was_stopped()


@contextmanager
def explain_resuming(journal: Journal) -> Iterator[None]:
    """For a job that is stopped, by a signal or an error, while answers are there."""
    try:
        yield
    except (typer.Exit, OutputLost):
        raise
    except BaseException as error:
        if journal.is_partly_answered and (journal.has_begun or _is_stop(error)):
            say(
                f"{len(journal.answered)} lines are answered in {journal.path}; the same command, "
                "without --overwrite, goes on from there"
            )
        raise


def parse_max_errors(text: str) -> int | float:
    """`5` is a number of lines, `0.001` a share of them; BadParameter for anything else."""
    if text.isascii() and text.isdecimal():
        return int(text)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise typer.BadParameter(
            f"{text!r} is neither a number of lines, such as 5, nor a share of them, such as 0.001"
        )
    return share


def end_with_status(journal: Journal, max_errors: int | float = 0) -> None:
    """Ends the command with status 2 if more lines than this, or this share of them, have an error
    row, of this run or an earlier one; says how many in any case."""
    if journal.first_error is None:
        return
    custom_id, message = journal.first_error
    count, lines = journal.num_errors, len(journal.answered)
    say(f"{count} lines got an error row (of {lines}), the first {custom_id}: {message}")
    most = max_errors if isinstance(max_errors, int) else max_errors * lines
    if count > most:
        raise typer.Exit(EXIT_REFUSALS)
