"""The output of a job: its lines, which requests they answer, and which job that was.

Each row is written whole as soon as it is there, so a kill loses nothing written, and the next run
goes on from it. What the job was is told by `OUTPUT.job.json`, which stays beside the output; rows
that wait for their turn are in `OUTPUT.waiting`, which goes with the last of them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from flexgen_ray.io.in_order import InOrder
from flexgen_ray.io.line_file import LineFile
from flexgen_ray.io.openai_batch import refusal
from flexgen_ray.units import format_bytes

# An empty answer's row takes more than this; half of it is ids, which gzip can't shorten.
_ROW_BYTES = {False: 400, True: 200}


class Journal:
    """Use as a context manager; if that ends with an error, a file without a row is removed.

    answered: custom_ids of rows that are there, found or appended. first_refusal: (custom_id,
    message) of the first that tells an error; num_refusals: how many do. begun_at: when the job
    began, for templates that ask for the time; a resumed run has the time of the first.
    """

    def __init__(self, path: Path, overwrite: bool = False, keep_order: bool = False) -> None:
        """Nothing is changed before `begin`.

        Raises OSError if the file can't be written, RuntimeError if another run is writing it,
        FileExistsError or ValueError if what it holds is not from a job of ours.
        """
        self.path = path
        self.answered: set[str] = set()
        self.num_refusals = 0
        self.first_refusal: tuple[str, str] | None = None
        self._facts: dict = {}
        self.begun_at = datetime.now()
        self._custom_ids: list[str] = []
        self._order: InOrder | None = None
        with ExitStack() as stack:
            self._file = LineFile(path)
            stack.callback(self._file.close)
            found = [it for it in (path, self._waiting_path) if it.is_file() and it.stat().st_size]
            self._resumes = self._file.is_file and not overwrite and bool(found)
            if self._resumes and not self._sidecar.is_file():
                raise FileExistsError(
                    f"{found[0]} already has content, but not of a job that could be resumed "
                    f"({self._sidecar} is missing); choose another --output, or give --overwrite"
                )
            self._num_bytes = self._recover() if self._resumes else 0
            self._num_written = len(self.answered)
            if keep_order:
                self._order = InOrder(self._file, self._waiting_file(stack))
                if self._resumes:
                    for row in self._order.recover(self.answered.copy()):
                        self._note(row)
            self._open_files = stack.pop_all()

    @property
    def can_resume(self) -> bool:
        """Whether another run could go on from what is written."""
        return self._file.is_file

    def check(self, facts: dict, custom_ids: list[str]) -> None:
        """Before any work is done for nothing: is it the same job, and has the disk room?

        facts: what the answers depend on, by name; JSON values. custom_ids: of all rows that the
        output will have, in their order.
        """
        # As they will be read back, where a tuple is a list.
        facts = json.loads(json.dumps(facts))
        self._facts = facts | {"begun_at": self.begun_at.isoformat()}
        self._custom_ids = custom_ids
        num_rows = len(custom_ids) - len(self.answered)
        if self._resumes:
            old = json.loads(self._sidecar.read_text(encoding="utf-8"))
            if "begun_at" in old:
                self.begun_at = datetime.fromisoformat(old.pop("begun_at"))
            for name in sorted(facts.keys() | old.keys()):
                if facts.get(name) != old.get(name):
                    raise ValueError(
                        f"{self.path} was begun with {name} {old.get(name)!r}, which now is "
                        f"{facts.get(name)!r}; go back to that, choose another --output, or give "
                        "--overwrite"
                    )
        if self._file.is_file:
            needed = num_rows * _ROW_BYTES[self.path.suffix == ".gz"]
            free = shutil.disk_usage(self.path.parent).free
            if needed > free:
                raise ValueError(
                    f"{num_rows} rows need at least {format_bytes(needed)}, but where {self.path} "
                    f"lies {format_bytes(free)} is free; make room, or choose another --output"
                )

    def begin(self) -> None:
        """From now on the file is this job's."""
        self._file.truncate(self._num_bytes)
        if self._order:
            self._order.begin(self._custom_ids[self._num_written :])
        if self._file.is_file and not self._resumes:
            if not self._order:
                self._waiting_path.unlink(missing_ok=True)
            # Once nothing of another job is left; as a whole, or not at all.
            draft = self.path.with_name(f"{self.path.name}.job.tmp")
            draft.write_text(json.dumps(self._facts, indent=2) + "\n", encoding="utf-8")
            draft.replace(self._sidecar)

    def append(self, row: dict) -> None:
        """One line in one piece; OSError names the file."""
        (self._order or self._file).append(row)
        self._note(row)

    def close(self) -> None:
        """What was written to a file is on disk when this returns."""
        if self._order and self._file.is_file and self._order.is_empty:
            self._waiting_path.unlink()
        self._open_files.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # While it is still locked.
        waits = self._order is not None and not self._order.is_empty
        if kind and self._file.is_new and not waits and self.path.stat().st_size == 0:
            self.path.unlink()
            self._sidecar.unlink(missing_ok=True)
        self.close()

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
        waiting = LineFile(path)
        stack.callback(waiting.close)
        return waiting

    def _recover(self) -> int:
        """Bytes of whole rows."""
        num_bytes = 0
        for _, end, row in self._file.rows():
            self._note(row)
            num_bytes = end
        return num_bytes

    def _note(self, row: dict) -> None:
        self.answered.add(row["custom_id"])
        message = refusal(row)
        if message is not None:
            self.num_refusals += 1
            self.first_refusal = self.first_refusal or (row["custom_id"], message)
