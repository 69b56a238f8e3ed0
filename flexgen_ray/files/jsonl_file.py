"""A file of JSON lines that only grows: each line whole or not at all, one process at a time.

Knows bytes, locks and signals; not what a line says. A path that ends in `.gz` gets a gzip member a
line, so that whatever was finished can be read after a kill. `-` is standard output.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import signal
import stat
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from flexgen_ray.files.input_lines import STANDARD_STREAM
from flexgen_ray.files.json_text import to_json
from flexgen_ray.signals import STOPS

# Small, as what follows a member's end is copied for each member that a piece holds.
_PIECE_BYTES = 8192


class OutputLost(OSError):
    """The output is no longer where it was written to."""


class JsonlFile:
    """Opened and locked, its content as it was. num_bytes: where the next line goes."""

    def __init__(self, path: Path, is_own: bool = False) -> None:
        """is_own: nothing but a file made by this project is to have that name.

        OSError if it can't be written or locked, or isn't such a file; RuntimeError if another
        process is writing it.
        """
        self.path = path
        self._is_gzip = path.suffix == ".gz"
        self.is_new = False
        self._is_begun = False
        if path == STANDARD_STREAM:
            self._fd = os.dup(1)
            # Whatever else is printed in this process must not end up among the lines.
            os.dup2(2, 1)
        else:
            self._fd, self.is_new = _open_locked(path, is_own)
        self.is_file = path != STANDARD_STREAM and stat.S_ISREG(os.fstat(self._fd).st_mode)
        self.num_bytes = 0

    def rows(self) -> Iterator[tuple[int, int, dict]]:
        """(start, end, row) of every whole line, in bytes of the file; a torn end is left out.

        Raises ValueError if the file holds anything else.
        """
        start = 0
        with self.path.open("rb") as file:
            for end, text in _members(file) if self._is_gzip else _lines(file):
                for line in filter(None, text.split(b"\n")):
                    yield start, end, self._parse(line, start)
                start = end

    def read(self, start: int, end: int) -> dict:
        """A line that `append` wrote there."""
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        return json.loads(gzip.decompress(content) if self._is_gzip else content)

    def truncate(self, num_bytes: int) -> None:
        """The next line goes there. OutputLost as `check`."""
        if self.is_file:
            os.ftruncate(self._fd, num_bytes)
        self.num_bytes = num_bytes
        self._is_begun = True
        self.check()

    def check(self) -> None:
        """OutputLost if the file was removed, moved or changed by others since `truncate`."""
        if not self.is_file or not self._is_begun:
            return
        status = os.fstat(self._fd)
        if status.st_size != self.num_bytes:
            raise OutputLost(
                f"{self.path} has {status.st_size} bytes, but this run has left {self.num_bytes} "
                "there: another program cut or wrote it; the same command answers again what is "
                "missing, if whole lines are left"
            )
        try:
            is_there = os.path.samestat(status, self.path.stat())
        except OSError:
            is_there = False
        if not is_there:
            raise OutputLost(_where_it_went(self._fd, status, self.path))

    def replace(self, rows: Iterator[dict]) -> None:
        """Has these rows instead, in one step: a kill leaves the old rows or the new ones."""
        draft = self.remove_draft()
        new = JsonlFile(draft, is_own=True)
        try:
            os.fchmod(new._fd, stat.S_IMODE(os.fstat(self._fd).st_mode))
            new.truncate(0)
            for row in rows:
                new.append(row)
            os.fsync(new._fd)
            self.check()
            draft.replace(os.path.realpath(self.path))
        except BaseException:
            new.close()
            draft.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd, self.num_bytes, self._is_begun = new._fd, new.num_bytes, True

    def remove_draft(self) -> Path:
        """Where `replace` writes first, and a run that was killed may have left something."""
        target = Path(os.path.realpath(self.path))
        draft = target.with_name(f".retry-{target.name}")
        if self.is_file:
            draft.unlink(missing_ok=True)
        return draft

    @property
    def is_empty(self) -> bool:
        return os.fstat(self._fd).st_size == 0

    def append(self, row: dict) -> None:
        """Ctrl-C and SIGTERM wait until the line is written; OSError names the file, which then
        ends with the line before. OutputLost as `check`."""
        self.check()
        line = (to_json(row, ensure_ascii=False) + "\n").encode()
        if self._is_gzip:
            line = gzip.compress(line, mtime=0)
        rest = memoryview(line)
        with _signals_wait():
            try:
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                self.truncate(self.num_bytes)
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error
            self.num_bytes += len(line)

    def sync(self) -> None:
        """Flush to disk what was written to a file, before this returns."""
        if self.is_file:
            os.fsync(self._fd)

    def remove_if_empty(self) -> bool:
        """Remove the file if it is empty and still has its name; True if so."""
        has_name = self.path.exists() and os.path.samestat(os.fstat(self._fd), self.path.stat())
        if has_name and self.is_empty:
            self.path.unlink()
        return has_name and self.is_empty

    def close(self) -> None:
        """Close the output; what was written to a file is on disk when this returns."""
        try:
            self.sync()
        finally:
            if self.path == STANDARD_STREAM:
                os.dup2(self._fd, 1)
            os.close(self._fd)

    def _parse(self, line: bytes, start: int) -> dict:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        is_row = isinstance(row, dict) and isinstance(row.get("custom_id"), str)
        if not is_row or not all(
            isinstance(row.get(key), dict | None) for key in ("response", "error")
        ):
            raise ValueError(
                f"{self.path} has something else than a response at byte {start}; take it out, "
                "choose another --output, or give --overwrite"
            )
        return row


def refuse_special_files(path: Path) -> None:
    """ValueError if something else than a plain file has the name, such as a symlink or FIFO."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(
            f"{path} is a symlink or no plain file, but the job keeps a file of its own there; "
            "remove it, or choose another --output"
        )


def _where_it_went(fd: int, status: os.stat_result, path: Path) -> str:
    """The fate of an open file that is not at its path any more, and the remedy."""
    if status.st_nlink == 0:
        return (
            f"{path} was removed or replaced while this run wrote it, and with it "
            f"{status.st_size} bytes of answers; run again to answer all anew"
        )
    return (
        f"{path} was moved to {os.readlink(f'/proc/self/fd/{fd}')} while this run wrote it; move "
        "it back, and the same command goes on from there"
    )


def _lock(fd: int, path: Path, is_new: bool) -> None:
    """BlockingIOError if another process has it; OSError where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if is_new:
            path.unlink(missing_ok=True)
        os.close(fd)
        raise OSError(
            f"{path} can't be locked ({os.strerror(error.errno or 0)}), so two runs might write it "
            "at once; choose an --output on a file system with locks, such as a local disk, and "
            "copy it later"
        ) from error


def _open_locked(path: Path, is_own: bool) -> tuple[int, bool]:
    """A descriptor, and whether the file was made. The lock goes with the process."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    if is_own:
        refuse_special_files(path)
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            fd, is_new = os.open(path, flags | os.O_EXCL, 0o666), True
        except FileExistsError:
            fd, is_new = os.open(path, flags, 0o666), False
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return fd, False
            _lock(fd, path, is_new)
            # Another run may have removed it between the two.
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd, is_new
        except BlockingIOError as error:
            os.close(fd)
            raise RuntimeError(
                f"another run is writing {path}; wait for its end, or choose another --output"
            ) from error
        os.close(fd)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(end, line) of every line that has its end."""
    end = 0
    for line in file:
        end += len(line)
        if line.endswith(b"\n"):
            yield end, line


def _members(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(end, content) of every gzip member that has its end."""
    end, piece = 0, b""
    while True:
        unzip = zlib.decompressobj(wbits=31)
        content = b""
        while not unzip.eof:
            piece = piece or file.read(_PIECE_BYTES)
            if not piece:
                return
            try:
                content += unzip.decompress(piece)
            except zlib.error as error:
                raise ValueError(
                    f"{file.name} is not gzip after byte {end} ({error}); choose another --output, "
                    "or give --overwrite"
                ) from error
            end += len(piece) - len(unzip.unused_data)
            piece = unzip.unused_data
        yield end, content


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals that stop a command are answered when the block has ended."""
    came: list[int] = []
    before = {}
    try:
        # Handlers belong to the main thread; no other is interrupted by them.
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                # None is an answer that isn't Python's, which can't be put back.
                if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                    before[number] = handler
                    signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
