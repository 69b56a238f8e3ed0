"""The output of a job: its lines, which requests they answer, and which job that was.

Each row is written whole as soon as it is there, so a kill loses nothing written, and the next run
goes on from it. What the job was is told by `OUTPUT.job.json`, which stays beside the output; rows
that wait for their turn are in `OUTPUT.waiting`, which goes with the last of them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from flexgen_ray.io.files import siblings, write_text
from flexgen_ray.io.in_order import InOrder
from flexgen_ray.io.job_facts import compare
from flexgen_ray.io.line_file import LineFile, refuse_others
from flexgen_ray.io.openai_batch import refusal
from flexgen_ray.units import format_bytes

# An empty answer's row takes more than this; half of it is ids, which gzip can't shorten.
_ROW_BYTES = {False: 400, True: 200}


class Journal:
    """Use as a context manager; if that ends with an error, a file without a row is removed.

    answered: custom_ids of rows that are there, found or appended. has_begun: whether the output
    may have been changed. first_refusal: (custom_id, message) of the first that tells an error;
    num_refusals: how many do. begun_at: when the job began, for templates that ask for the time; a
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
        self.num_refusals = 0
        self.first_refusal: tuple[str, str] | None = None
        self.has_begun = False
        self.notes: list[str] = []
        self._retries = retry_errors
        self._facts: dict = {}
        self.begun_at = datetime.now()
        self._custom_ids: list[str] = []
        self._order: InOrder | None = None
        for beside in siblings(path):
            refuse_others(beside)
        with ExitStack() as stack:
            self._file = LineFile(path)
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
                self._order = InOrder(self._file, self._waiting_file(stack))
            if self._resumes:
                self._recover()
            self._open_files = stack.pop_all()

    @property
    def can_resume(self) -> bool:
        """Whether another run could go on from what is written."""
        return self._file.is_file

    @property
    def can_go_on(self) -> bool:
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
            self.notes = compare(str(self.path), old, facts, defaults or {}, self._retries)
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
        for beside in siblings(self.path):
            refuse_others(beside)
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

    def _waiting_file(self, stack: ExitStack) -> LineFile:
        path = self._waiting_path
        if not self._file.is_file:
            # A nameless file is gone when the process is.
            nameless = stack.enter_context(tempfile.TemporaryFile())
            path = Path(f"/proc/self/fd/{nameless.fileno()}")
        waiting = LineFile(path, is_own=self._file.is_file)
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
        return self._retries and refusal(row) is not None

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
        message = refusal(row)
        if message is not None:
            self.num_refusals += 1
            self.first_refusal = self.first_refusal or (row["custom_id"], message)
