"""The output of a job: its lines, which requests they answer, and which job that was.

Each row is written whole as soon as it is there, so a kill loses nothing written, and the next run
goes on from it. What the job was is told by `OUTPUT.job.json`, which stays beside the output; rows
that wait for their turn are in `OUTPUT.waiting`, which goes with the last of them.

Rows in a given order, though they come in another. What comes early waits in a file.

Comparison of a job with the one that an output was begun with: what answers depend on.

Knows names and values; not how they come about.
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

MODEL_FILES = "model_files"  # of each file of the model, what tells it from a changed one


def compare_facts(
    output: str, old: Mapping, new: Mapping, defaults: Mapping, may_add_files: bool
) -> list[str]:
    """Notes for the user on what can't be compared.

    old: facts that the output was begun with; defaults: of those that an earlier version didn't
    write. may_add_files: the model may have files that it lacked.
    Raises ValueError, naming the first fact that differs.
    """
    notes = []
    for name in sorted(new.keys() | old.keys()):
        if name == MODEL_FILES:
            if name in old:
                _compare_files(output, old[name], new.get(name, {}), may_add_files)
            else:
                notes.append(
                    f"{output} was begun by an earlier version, which didn't note the model's "
                    "files; they are taken to be the same"
                )
        elif new.get(name, defaults.get(name)) != old.get(name, defaults.get(name)):
            raise ValueError(
                f"{output} was begun with {name} {old.get(name)!r}, which now is "
                f"{new.get(name)!r}; go back to that, choose another --output, or give "
                "--overwrite"
            )
    return notes


def _compare_files(output: str, old: Any, new: Any, may_add_files: bool) -> None:
    for name in sorted(new.keys() | old.keys()):
        if new.get(name) != old.get(name) and not (may_add_files and name not in old):
            how = "was removed" if name not in new else "was added"
            how = "has changed" if name in new and name in old else how
            raise ValueError(
                f"the model's {name} {how} since {output} was begun, so its other answers would "
                "be another model's; put the old file back, choose another --output, or give "
                "--overwrite"
            )


class OrderedWriter:
    """Passes rows on to `file` when it is their turn; of those that wait in `waiting`, which a kill
    doesn't lose, memory holds only the places."""

    def __init__(self, file: JsonlFile, waiting: JsonlFile) -> None:
        self._file = file
        self._waiting = waiting
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._order: Iterator[str] = iter(())
        self._next: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no row waits, nor might still be wanted."""
        return self._waiting.is_empty

    def recover(self, is_wanted: Callable[[dict], bool]) -> Iterator[dict]:
        """Rows that wait since an earlier run and are wanted; others may still be there."""
        for start, end, row in self._waiting.rows():
            self._end = end
            if is_wanted(row):
                self._places[row["custom_id"]] = start, end
                yield row

    def begin(self, num_bytes: int, custom_ids: Iterable[str], moved: Iterable[dict] = ()) -> None:
        """num_bytes: of the file's rows that stay; custom_ids: of all that are to come or wait, in
        their order; moved: rows beyond those bytes that wait from now on."""
        self._waiting.truncate(self._end)
        for row in moved:
            self._keep(row)
        self._waiting.sync()
        self._file.truncate(num_bytes)
        self._order = iter(custom_ids)
        self._advance()

    def append(self, row: dict) -> None:
        """At once if it is this row's turn, and then those that waited for it."""
        if row["custom_id"] == self._next:
            self._file.append(row)
            self._advance()
            return
        self._keep(row)

    def _keep(self, row: dict) -> None:
        start = self._waiting.num_bytes
        self._waiting.append(row)
        self._places[row["custom_id"]] = start, self._waiting.num_bytes

    def _advance(self) -> None:
        while (custom_id := next(self._order, None)) in self._places:
            self._file.append(self._waiting.read(*self._places.pop(custom_id)))
        self._next = custom_id
        if not self._places and self._waiting.num_bytes:
            self._waiting.truncate(0)


# An empty answer's row takes more than this; half of it is ids, which gzip can't shorten.
_ROW_BYTES = {False: 400, True: 200}


class Journal:
    """Use as a context manager; if that ends with an error, a file without a row is removed.

    answered: custom_ids of rows that are there, found or appended. has_begun: whether the output
    may have been changed. first_error: (custom_id, message) of the first that tells an error;
    num_errors: how many do. begun_at: when the job began, for templates that ask for the time; a
    resumed run has the time of the first.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        keep_order: bool = False,
        retry_errors: bool = False,
    ) -> None:
        """Nothing is changed before `begin`. retry_errors: rows that tell an error don't count, and
        make room for new ones.

        Raises OSError if the file can't be written, RuntimeError if another run is writing it,
        FileExistsError or ValueError if what it holds is not from a job of ours.
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
            found = [it for it in (path, self._waiting_path) if it.is_file() and it.stat().st_size]
            self._resumes = self._file.is_file and not overwrite and bool(found)
            if self._resumes and not self._sidecar.is_file():
                raise FileExistsError(
                    f"{found[0]} already has content, but not of a job that could be resumed "
                    f"({self._sidecar} is missing); choose another --output, or give --overwrite"
                )
            # Bytes and rows before the first row that is answered again; all, if none is.
            self._kept_bytes, self._num_kept, self._first_dropped = 0, 0, -1
            if keep_order:
                self._order = OrderedWriter(self._file, self._waiting_file(stack))
            if self._resumes:
                self._recover()
            self._open_files = stack.pop_all()

    @property
    def can_resume(self) -> bool:
        """Whether another run could go on from what is written."""
        return self._file.is_file

    @property
    def is_partly_answered(self) -> bool:
        """True if another run would find answers to keep, and lines to answer."""
        return self.can_resume and 0 < len(self.answered) < len(self._custom_ids)

    def check(
        self, facts: dict, custom_ids: list[str], defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Before any work is done for nothing: is it the same job, and has the disk room?

        facts: what the answers depend on, by name; JSON values. custom_ids: of all rows that the
        output will have, in their order. defaults: of facts that a job begun by an earlier version
        doesn't name. Raises ValueError for another job, or too little room.
        """
        # As they will be read back, where a tuple is a list.
        facts = json.loads(json.dumps(facts))
        self._custom_ids = custom_ids
        num_rows = len(custom_ids) - len(self.answered)
        if self._resumes:
            old = self._facts_so_far()
            if "begun_at" in old:
                self.begun_at = datetime.fromisoformat(old.pop("begun_at"))
            self.notes = compare_facts(str(self.path), old, facts, defaults or {}, self._retries)
        self._facts = facts | {"begun_at": self.begun_at.isoformat()}
        if self._file.is_file:
            needed = num_rows * _ROW_BYTES[self.path.suffix == ".gz"]
            if self._first_dropped >= 0:
                needed += self.path.stat().st_size  # a copy without the rows that are dropped
            free = shutil.disk_usage(self.path.parent).free
            if needed > free:
                raise ValueError(
                    f"{num_rows} rows need at least {format_bytes(needed)}, but where {self.path} "
                    f"lies {format_bytes(free)} is free; make room, or choose another --output"
                )

    def begin(self) -> None:
        """From now on the file is this job's."""
        self.has_begun = True
        for beside in sidecar_paths(self.path):
            refuse_special_files(beside)
        if self._order:
            missing = self._custom_ids[self._num_kept :]
            self._order.begin(self._kept_bytes, missing, self._kept_rows(self._kept_bytes))
        elif self._first_dropped >= 0:
            self._file.replace(self._kept_rows())
        else:
            self._file.remove_draft()
            self._file.truncate(self._kept_bytes)
        if self._file.is_file:
            if not self._order:
                self._waiting_path.unlink(missing_ok=True)
            # Once nothing of another job is left; as a whole, or not at all.
            draft = self.path.with_name(f"{self.path.name}.job.tmp")
            write_text(self._sidecar, json.dumps(self._facts, indent=2) + "\n", draft)

    def append(self, row: dict) -> None:
        """One line in one piece; OSError names the file."""
        (self._order or self._file).append(row)
        self._note(row)

    def confirm(self) -> None:
        """OutputLost if the output isn't there any more as it was written."""
        self._file.check()

    def close(self) -> None:
        """What was written to a file is on disk when this returns."""
        if self._order and self._file.is_file and self._order.is_empty:
            self._waiting_path.unlink(missing_ok=True)
        self._open_files.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # While it is still locked.
        self._remove_if_failed(kind)
        self.close()

    def _remove_if_failed(self, kind: type | None, *_: object) -> None:
        """A failed run leaves no empty file that wasn't there before."""
        if kind is None or not self._file.is_new or (self._order and not self._order.is_empty):
            return
        if self._file.remove_if_empty():
            self._sidecar.unlink(missing_ok=True)

    @property
    def _sidecar(self) -> Path:
        return self.path.with_name(f"{self.path.name}.job.json")

    @property
    def _waiting_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.waiting")

    def _waiting_file(self, stack: ExitStack) -> JsonlFile:
        path = self._waiting_path
        if not self._file.is_file:
            # A nameless file is gone when the process is.
            nameless = stack.enter_context(tempfile.TemporaryFile())
            path = Path(f"/proc/self/fd/{nameless.fileno()}")
        waiting = JsonlFile(path, is_own=self._file.is_file)
        stack.callback(waiting.close)
        return waiting

    def _recover(self) -> None:
        """Takes note of the rows that are there."""
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
        return self._retries and error_message(row) is not None

    def _kept_rows(self, first: int = 0) -> Iterator[dict]:
        """Rows of the file from this byte on that stay."""
        if self._first_dropped >= 0:
            for start, _, row in self._file.rows():
                if start >= first and not self._is_dropped(row):
                    yield row

    def _facts_so_far(self) -> dict:
        """The facts that an earlier run noted; ValueError if its file is damaged."""
        try:
            facts = json.loads(self._sidecar.read_bytes())
            if not isinstance(facts, dict):
                raise ValueError("no object of facts")
            datetime.fromisoformat(facts.get("begun_at", "2000-01-01"))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self._sidecar} is damaged ({error}), so the job can't go on; put it back, "
                "choose another --output, or give --overwrite"
            ) from error
        return facts

    def _note(self, row: dict) -> None:
        self.answered.add(row["custom_id"])
        message = error_message(row)
        if message is not None:
            self.num_errors += 1
            self.first_error = self.first_error or (row["custom_id"], message)
