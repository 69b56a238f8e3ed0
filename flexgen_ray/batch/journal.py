"""The output of a job: rows that are answered already, in which order, and of which job.

On disk, a job with the output OUT.jsonl has up to four files:

    OUT.jsonl            the response lines; each is appended whole as soon as it is known
    OUT.jsonl.job.json   the facts of the job: everything its answers depend on; never removed
    OUT.jsonl.waiting    with keep_order: rows that came early and wait for their turn
    OUT.jsonl.job.tmp    a draft of job.json, renamed over it when it is complete

In time: opening a Journal reads and locks the files and changes nothing. `check` compares the job's
facts with those on disk, and still changes nothing. `begin` is the first write: rows that are to be
answered again are taken out, and job.json is written. `append` then adds row after row.

A kill at any moment (kill -9) leaves whole rows, and perhaps one torn line at the end of a file,
which the next run cuts off. The next run reads the rows of OUT.jsonl and of OUT.jsonl.waiting,
takes their custom_ids as answered, and goes on with the others. No row is lost between the two
files: the waiting file is emptied only when all its rows are in the output. A row that is in both
counts once.

Knows rows and names of facts; nothing of how answers come about.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from flexgen_ray.batch.response_lines import error_message
from flexgen_ray.files.jsonl_file import JsonlFile, refuse_special_files
from flexgen_ray.files.output_files import sidecar_paths, write_text
from flexgen_ray.units import format_bytes

MODEL_FILES = "model_files"  # the fact that holds a fingerprint of each of the model's files
# Least bytes of a row, by whether it is compressed: an empty answer's row takes more. Half of it is
# random ids, which gzip can't shorten.
_ROW_BYTES = {False: 400, True: 200}


class Journal:
    """The output file of a job, locked for this process, and the files beside it.

    Use as a context manager; if the block ends with an error, a new output without rows is removed.

    answered: custom_ids of all rows in the output, from an earlier run or appended by this one.
    num_errors, first_error: number of rows that are errors, and the first as (custom_id, message).
    has_begun: whether `begin` was called, so the output may have been changed.
    begun_at: when the job began, for chat templates that print the date; a resumed run keeps it.
    notes: sentences for the user, from `check`.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        keep_order: bool = False,
        retry_errors: bool = False,
    ) -> None:
        """Open and lock the output and read its rows. Nothing is changed before `begin`.

        overwrite: drop the rows of an earlier run.
        keep_order: write rows in the order of the input; those that come early wait in a file.
        retry_errors: count rows that are errors as not answered, and drop them when the run begins.
        Raises OSError if the file can't be written, RuntimeError if another run is writing it, and
        FileExistsError or ValueError if it holds something other than rows of a job.
        """
        self.path = path
        self.answered: set[str] = set()
        self.num_errors = 0
        self.first_error: tuple[str, str] | None = None
        self.has_begun = False
        self.notes: list[str] = []
        self._retries = retry_errors
        self._facts: dict = {}
        self.begun_at = datetime.now()
        self._custom_ids: list[str] = []
        self._order: OrderedWriter | None = None
        for beside in sidecar_paths(path):
            refuse_special_files(beside)
        with ExitStack() as stack:
            self._file = JsonlFile(path)
            stack.callback(self._file.close)
            stack.push(self._remove_if_failed)
            paths = (path, self._waiting_path)
            nonempty = [it for it in paths if it.is_file() and it.stat().st_size]
            self._resumes = self._file.is_file and not overwrite and bool(nonempty)
            if self._resumes and not self._facts_path.is_file():
                raise FileExistsError(
                    f"{nonempty[0]} already has content, but not of a job that could be resumed "
                    f"({self._facts_path} is missing); choose another --output, or give --overwrite"
                )
            # The output's rows before the first one that is dropped, in bytes and number: they stay
            # as they are. _first_dropped: where that one begins; -1 if none is dropped.
            self._kept_bytes, self._num_kept, self._first_dropped = 0, 0, -1
            if keep_order:
                self._order = OrderedWriter(self._file, self._waiting_file(stack))
            if self._resumes:
                self._recover()
            self._open_files = stack.pop_all()

    @property
    def can_resume(self) -> bool:
        """True if a later run can read what is written; false for standard output and pipes."""
        return self._file.is_file

    @property
    def is_partly_answered(self) -> bool:
        """True if a later run would find some answers to keep and some lines to answer."""
        return self.can_resume and 0 < len(self.answered) < len(self._custom_ids)

    def check(
        self, facts: dict, custom_ids: list[str], defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Check, before any work, that this is the job of the output and that the disk has room.

        facts: everything that answers depend on, by name; JSON values.
        custom_ids: those of all rows that the output will have, in the order of the input.
        defaults: values of facts that a job begun by an earlier version doesn't name.
        Raises ValueError if the output is of another job, or if the disk is too full.
        """
        # Compare facts in the form in which they are read back: JSON has lists, no tuples.
        facts = json.loads(json.dumps(facts))
        self._custom_ids = custom_ids
        num_rows = len(custom_ids) - len(self.answered)
        if self._resumes:
            old = self._read_facts()
            if "begun_at" in old:
                self.begun_at = datetime.fromisoformat(old.pop("begun_at"))
            self.notes = compare_facts(str(self.path), old, facts, defaults or {}, self._retries)
        self._facts = facts | {"begun_at": self.begun_at.isoformat()}
        if self._file.is_file:
            needed = num_rows * _ROW_BYTES[self.path.suffix == ".gz"]
            if self._first_dropped >= 0:
                needed += self.path.stat().st_size  # `begin` writes a copy without dropped rows
            free = shutil.disk_usage(self.path.parent).free
            if needed > free:
                raise ValueError(
                    f"{num_rows} rows need at least {format_bytes(needed)}, but the disk of "
                    f"{self.path} has {format_bytes(free)} free; make room, or choose another "
                    "--output"
                )

    def begin(self) -> None:
        """Take the output for this job: drop what isn't kept, then write the job's facts.

        The order matters for a kill in between. Rows are dropped before job.json is replaced, so
        rows of another job never lie beside this job's facts.
        """
        self.has_begun = True
        # Others may have put something there since the journal was opened.
        for beside in sidecar_paths(self.path):
            refuse_special_files(beside)
        if self._order:
            # Kept rows after the first dropped one may be out of their turn now: they move to the
            # waiting file, and the output is cut before the first dropped row.
            missing = self._custom_ids[self._num_kept :]
            self._order.begin(self._kept_bytes, missing, self._kept_rows(self._kept_bytes))
        elif self._first_dropped >= 0:
            self._file.replace(self._kept_rows())
        else:
            # Cuts a torn line off or, with --overwrite, everything.
            self._file.remove_draft()
            self._file.truncate(self._kept_bytes)
        if self._file.is_file:
            if not self._order:
                self._waiting_path.unlink(missing_ok=True)
            draft = self.path.with_name(f"{self.path.name}.job.tmp")
            write_text(self._facts_path, json.dumps(self._facts, indent=2) + "\n", draft)

    def append(self, row: dict) -> None:
        """Write a row as one whole line, to the output or to the rows that wait for their turn.

        Raises OSError, naming the file, and OutputLost if the output was changed by others.
        """
        (self._order or self._file).append(row)
        self._note(row)

    def confirm(self) -> None:
        """Raise OutputLost if the output is no longer there as this run wrote it."""
        self._file.check()

    def close(self) -> None:
        """Flush the files to disk and release their locks."""
        if self._order and self._file.is_file and self._order.is_empty:
            self._waiting_path.unlink(missing_ok=True)
        self._open_files.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # Before the lock is released, so that no other run can have begun to write the file.
        self._remove_if_failed(kind)
        self.close()

    def _remove_if_failed(self, kind: type | None, *_: object) -> None:
        """After an error (kind), remove an output without rows that this run created."""
        if kind is None or not self._file.is_new or (self._order and not self._order.is_empty):
            return
        if self._file.remove_if_empty():
            self._facts_path.unlink(missing_ok=True)

    @property
    def _facts_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.job.json")

    @property
    def _waiting_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.waiting")

    def _waiting_file(self, stack: ExitStack) -> JsonlFile:
        """Open the file of rows that wait for their turn; the stack closes it."""
        path = self._waiting_path
        if not self._file.is_file:
            # Standard output can't be resumed, so neither can its waiting rows: a temporary file
            # without a name disappears with the process.
            nameless = stack.enter_context(tempfile.TemporaryFile())
            path = Path(f"/proc/self/fd/{nameless.fileno()}")
        waiting = JsonlFile(path, is_own=self._file.is_file)
        stack.callback(waiting.close)
        return waiting

    def _recover(self) -> None:
        """Read the rows of an earlier run: those of the output, then those that wait.

        Sets `answered`, and where the output's kept rows end. Example with retry_errors and rows
        a, b, E (an error), c: answered is {a, b, c}, _kept_bytes ends after b, and _first_dropped
        is where E begins.
        """
        written: set[str] = set()
        for start, end, row in self._file.rows():
            if self._is_dropped(row):
                self._first_dropped = start if self._first_dropped < 0 else self._first_dropped
                continue
            self._note(row)
            written.add(row["custom_id"])
            if self._first_dropped < 0:
                self._kept_bytes, self._num_kept = end, len(written)
        if self._order:

            def is_wanted(row: dict) -> bool:
                return row["custom_id"] not in written and not self._is_dropped(row)

            for row in self._order.recover(is_wanted):
                self._note(row)

    def _is_dropped(self, row: dict) -> bool:
        """True if a row is an error that is to be answered again."""
        return self._retries and error_message(row) is not None

    def _kept_rows(self, first: int = 0) -> Iterator[dict]:
        """Yield the output's rows from byte `first` on that aren't dropped, if any is dropped."""
        if self._first_dropped >= 0:
            for start, _, row in self._file.rows():
                if start >= first and not self._is_dropped(row):
                    yield row

    def _read_facts(self) -> dict:
        """Return the facts that an earlier run wrote. Raises ValueError if the file is damaged."""
        try:
            facts = json.loads(self._facts_path.read_bytes())
            if not isinstance(facts, dict):
                raise ValueError("no object of facts")
            datetime.fromisoformat(facts.get("begun_at", "2000-01-01"))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self._facts_path} is damaged ({error}), so the job can't be resumed; restore "
                "it, choose another --output, or give --overwrite"
            ) from error
        return facts

    def _note(self, row: dict) -> None:
        """Count a row that is in the output, or waits for its turn, as answered."""
        self.answered.add(row["custom_id"])
        message = error_message(row)
        if message is not None:
            self.num_errors += 1
            self.first_error = self.first_error or (row["custom_id"], message)


class OrderedWriter:
    """Writes rows in a given order, though they come in another.

    A row whose turn it is goes to `file`; others go to `waiting`, a file too, so that a kill loses
    none. Memory holds only their byte offsets. Example with order a, b, c: `append(c)` writes c to
    `waiting`; `append(a)` writes a to `file`; `append(b)` writes b to `file`, then c, and empties
    `waiting`.
    """

    def __init__(self, file: JsonlFile, waiting: JsonlFile) -> None:
        self._file = file
        self._waiting = waiting
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._order: Iterator[str] = iter(())
        self._next: str | None = None

    @property
    def is_empty(self) -> bool:
        """True if the waiting file is empty."""
        return self._waiting.is_empty

    def recover(self, is_wanted: Callable[[dict], bool]) -> Iterator[dict]:
        """Yield the rows that wait since an earlier run and are wanted.

        Unwanted ones, such as rows that the output has already, stay in the file unused until it is
        emptied.
        """
        for start, end, row in self._waiting.rows():
            self._end = end
            if is_wanted(row):
                self._places[row["custom_id"]] = start, end
                yield row

    def begin(self, num_bytes: int, custom_ids: Iterable[str], moved: Iterable[dict] = ()) -> None:
        """Cut the file to the rows that stay, and write rows that wait if it is their turn.

        num_bytes: length of the file's rows that stay.
        custom_ids: those of all rows after these, in order, whether they wait or are yet to come.
        moved: rows of the file beyond num_bytes that wait from now on.
        """
        # Moved rows are on disk in the waiting file before the output is cut: a kill in between
        # leaves them in both files, never in neither.
        self._waiting.truncate(self._end)
        for row in moved:
            self._wait(row)
        self._waiting.sync()
        self._file.truncate(num_bytes)
        self._order = iter(custom_ids)
        self._advance()

    def append(self, row: dict) -> None:
        """Write a row to the file if it is its turn, and then the rows that waited for it.

        Otherwise the row waits.
        """
        if row["custom_id"] == self._next:
            self._file.append(row)
            self._advance()
            return
        self._wait(row)

    def _wait(self, row: dict) -> None:
        """Write a row to the waiting file."""
        start = self._waiting.num_bytes
        self._waiting.append(row)
        self._places[row["custom_id"]] = start, self._waiting.num_bytes

    def _advance(self) -> None:
        """Write the next rows in order as long as they wait; set the one that is missing next."""
        while (custom_id := next(self._order, None)) in self._places:
            self._file.append(self._waiting.read(*self._places.pop(custom_id)))
        self._next = custom_id
        # All that waited is in the output: the waiting file can be emptied.
        if not self._places and self._waiting.num_bytes:
            self._waiting.truncate(0)


def compare_facts(
    output: str, old: Mapping, new: Mapping, defaults: Mapping, may_add_files: bool
) -> list[str]:
    """Check that a job has the facts that its output was begun with.

    output: its path, for messages. old: facts that the output was begun with. new: today's.
    defaults: values of facts that an earlier version of this project didn't write.
    may_add_files: accept model files that were missing when the output was begun.
    Returns notes for the user on what can't be compared.
    Raises ValueError, naming the first fact that differs, with the remedy.
    """
    notes = []
    for name in sorted(new.keys() | old.keys()):
        if name == MODEL_FILES:
            if name in old:
                _compare_files(output, old[name], new.get(name, {}), may_add_files)
            else:
                notes.append(
                    f"{output} was begun by an earlier version, which didn't record the model's "
                    "files; they are assumed to be the same"
                )
        elif new.get(name, defaults.get(name)) != old.get(name, defaults.get(name)):
            raise ValueError(
                f"{output} was begun with {name} {old.get(name)!r}, which now is "
                f"{new.get(name)!r}; set it back, choose another --output, or give --overwrite"
            )
    return notes


def _compare_files(output: str, old: Any, new: Any, may_add_files: bool) -> None:
    """Raise ValueError, naming the first of the model's files whose fingerprint differs.

    old, new: fingerprint of each file by its name.
    """
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name) and not (may_add_files and name not in old):
            how = "was removed" if name not in new else "was added"
            how = "has changed" if name in new and name in old else how
            raise ValueError(
                f"the model's {name} {how} since {output} was begun, so further answers would be "
                "another model's; restore the old file, choose another --output, or give "
                "--overwrite"
            )
