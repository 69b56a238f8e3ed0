"""The end of a command: its exit status, and one sentence about what went wrong.

Exit status: 0 if every line was answered (or all but --max-errors), 1 if the command could not run,
2 if more lines got an error row, 64 for wrong usage, 130 if it was stopped.
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
# Base class of typer's errors about wrong options; typer doesn't export it.
_UsageError: Any = typer.BadParameter.__bases__[0]


def run(command: Callable[..., Any]) -> NoReturn:
    """Run a Typer app and end the process with its exit status; an error is one line on stderr."""
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
    """Describe an error in one line; if it was not foreseen, with the file of its traceback."""
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
    """True if this project raised the error for users, or the system did about a file."""
    if not isinstance(error, ValueError | OSError | RuntimeError) or hasattr(error, "__notes__"):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    is_raised = linecache.getline(file, number).lstrip().startswith("raise ")
    return is_raised and Path(file).is_relative_to(_PACKAGE)


def _keep_traceback(error: BaseException) -> Path:
    """Write the traceback to a file in the user's cache, or to a temporary file if that fails."""
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
    """True if the error is a stop, or came during one, as from a closed terminal."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None or was_stopped()


@contextmanager
def explain_resuming(journal: Journal) -> Iterator[None]:
    """Context in which a signal or an error that stops the job also prints how to resume it."""
    try:
        yield
    except (typer.Exit, OutputLost):
        raise
    except BaseException as error:
        if journal.is_partly_answered and (journal.has_begun or _is_stop(error)):
            say(
                f"{len(journal.answered):,} lines are answered in {journal.path}; run the same "
                "command again, without --overwrite, to answer the others"
            )
        raise


def parse_max_errors(text: str) -> int | float:
    """Parse a number of lines, such as "5", or a share of them, such as "0.001"."""
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
    """Print how many lines have an error row, and exit with status 2 if they are too many.

    Rows of earlier runs count too. max_errors: a number of lines (int) or a share of them (float)
    that is tolerated.
    """
    if journal.first_error is None:
        return
    custom_id, message = journal.first_error
    count, lines = journal.num_errors, len(journal.answered)
    say(f"{count} lines got an error row (of {lines}), the first {custom_id}: {message}")
    most = max_errors if isinstance(max_errors, int) else max_errors * lines
    if count > most:
        raise typer.Exit(EXIT_REFUSALS)
