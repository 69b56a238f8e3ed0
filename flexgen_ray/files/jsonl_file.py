"""An append-only file of JSON lines: each line whole or not at all, one writing process at a time.

After a kill the file holds whole lines and at most one torn line at its end, which readers skip. In
a path that ends in `.gz` each line is a gzip member of its own, so the same is true there. `-` is
standard output. Knows bytes, locks and signals, and the outer shape of a response line; nothing of
jobs.
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

# Small: zlib copies the rest of a piece for every member that ends within it, and members are
# short.
_PIECE_BYTES = 8192


class OutputLost(OSError):
    """The output file was removed, moved or changed by another program while a run wrote it."""


class JsonlFile:
    """A JSONL file, open and locked for this process. Opening it doesn't change its content.

    num_bytes: length of the file as this process knows it; the next line begins there.
    is_new: the file didn't exist before. is_file: false for standard output, pipes and devices,
    which can't be read back or truncated.
    """

    def __init__(self, path: Path, is_own: bool = False) -> None:
        """Open the file, creating it if need be, and lock it until this object or process ends.

        is_own: the path is one of this project's own files, so a symlink or special file there is
        refused. Raises OSError if the file can't be written or locked, RuntimeError if another
        process is writing it.
        """
        self.path = path
        self._is_gzip = path.suffix == ".gz"
        self.is_new = False
        self._is_begun = False
        if path == STANDARD_STREAM:
            self._fd = os.dup(1)
            # The rows keep a descriptor of their own, and whatever else this process prints to
            # standard output goes to standard error instead of among the rows.
            os.dup2(2, 1)
        else:
            self._fd, self.is_new = _open_locked(path, is_own)
        self.is_file = path != STANDARD_STREAM and stat.S_ISREG(os.fstat(self._fd).st_mode)
        self.num_bytes = 0

    def rows(self) -> Iterator[tuple[int, int, dict]]:
        """Yield (start, end, row) of every whole line; start and end are byte offsets in the file.

        A torn line at the end is left out. Raises ValueError if the file holds anything but
        response lines.
        """
        start = 0
        with self.path.open("rb") as file:
            for end, text in _members(file) if self._is_gzip else _lines(file):
                for line in filter(None, text.split(b"\n")):
                    yield start, end, self._parse(line, start)
                start = end

    def read(self, start: int, end: int) -> dict:
        """Return the row that lies at these byte offsets."""
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        return json.loads(gzip.decompress(content) if self._is_gzip else content)

    def truncate(self, num_bytes: int) -> None:
        """Cut the file to this length, so that the next line begins there.

        From now on the file belongs to this run: `check` notices if others change it. Raises
        OutputLost as `check` does.
        """
        if self.is_file:
            os.ftruncate(self._fd, num_bytes)
        self.num_bytes = num_bytes
        self._is_begun = True
        self.check()

    def check(self) -> None:
        """Raise OutputLost if another program moved, removed or wrote the file since `truncate`."""
        if not self.is_file or not self._is_begun:
            return
        status = os.fstat(self._fd)
        if status.st_size != self.num_bytes:
            raise OutputLost(
                f"{self.path} has {status.st_size} bytes, but this run has left {self.num_bytes} "
                "there: another program truncated or wrote it; if whole lines are left, the same "
                "command answers what is missing"
            )
        try:
            is_there = os.path.samestat(status, self.path.stat())
        except OSError:
            is_there = False
        if not is_there:
            raise OutputLost(_where_it_went(self._fd, status, self.path))

    def replace(self, rows: Iterator[dict]) -> None:
        """Replace the file's rows with these, in one step: a kill leaves the old rows or the new.

        The rows may be read from this very file while they are written.
        """
        # Write a whole new file beside the old one, flush it to disk, and rename it over the old
        # one. Both are locked meanwhile, so no other run gets in between.
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
        """Remove the draft that a killed `replace` may have left, and return its path."""
        target = Path(os.path.realpath(self.path))
        draft = target.with_name(f".retry-{target.name}")
        if self.is_file:
            draft.unlink(missing_ok=True)
        return draft

    @property
    def is_empty(self) -> bool:
        """True if the file has no bytes."""
        return os.fstat(self._fd).st_size == 0

    def append(self, row: dict) -> None:
        """Append a row as one whole line. Ctrl-C and SIGTERM take effect after it is written.

        Raises OSError, naming the file, which then ends with the line before (as on a full disk),
        and OutputLost as `check` does.
        """
        self.check()
        line = (to_json(row, ensure_ascii=False) + "\n").encode()
        if self._is_gzip:
            line = gzip.compress(line, mtime=0)
        rest = memoryview(line)
        with _signals_deferred():
            try:
                # write() may take only a part of a long line.
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except OSError as error:
                # Take a torn line back.
                self.truncate(self.num_bytes)
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error
            self.num_bytes += len(line)

    def sync(self) -> None:
        """Flush what was written to disk; does nothing for standard output, pipes and devices."""
        if self.is_file:
            os.fsync(self._fd)

    def remove_if_empty(self) -> bool:
        """Remove the file if it is empty and still at its path; return whether it was removed."""
        has_name = self.path.exists() and os.path.samestat(os.fstat(self._fd), self.path.stat())
        if has_name and self.is_empty:
            self.path.unlink()
        return has_name and self.is_empty

    def close(self) -> None:
        """Flush the file to disk, close it and release its lock."""
        try:
            self.sync()
        finally:
            if self.path == STANDARD_STREAM:
                os.dup2(self._fd, 1)
            os.close(self._fd)

    def _parse(self, line: bytes, start: int) -> dict:
        """Return a response row. Raises ValueError for a line that has not the shape of one."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        is_row = isinstance(row, dict) and isinstance(row.get("custom_id"), str)
        if not is_row or not all(
            isinstance(row.get(key), dict | None) for key in ("response", "error")
        ):
            raise ValueError(
                f"{self.path} has something other than a response at byte {start}; remove it, "
                "choose another --output, or give --overwrite"
            )
        return row


def refuse_special_files(path: Path) -> None:
    """Raise ValueError if a symlink, pipe or anything else but a regular file has this path."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(
            f"{path} is a symlink or not a regular file, but the job keeps a file of its own "
            "there; remove it, or choose another --output"
        )


def _where_it_went(fd: int, status: os.stat_result, path: Path) -> str:
    """Return a sentence that says where an open file went from its path, and the remedy."""
    if status.st_nlink == 0:
        return (
            f"{path} was removed or replaced while this run wrote it, and with it "
            f"{status.st_size} bytes of answers; run again to answer everything anew"
        )
    return (
        f"{path} was moved to {os.readlink(f'/proc/self/fd/{fd}')} while this run wrote it; move "
        "it back, and the same command goes on from there"
    )


def _lock(fd: int, path: Path, is_new: bool) -> None:
    """Lock a file for this process.

    Raises BlockingIOError if another process holds the lock, OSError with a remedy if the file
    system has no locks. is_new: the file was created just now, and is removed if it can't be
    locked.
    """
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
    """Open a file for appending and lock it; return its descriptor and whether it was created.

    The lock ends with the process, however it ends. Pipes and devices are not locked.
    """
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
            # Another run may have removed the file after it was opened and before it was locked:
            # then this descriptor's file has no name, and the path must be opened again.
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd, is_new
        except BlockingIOError as error:
            os.close(fd)
            raise RuntimeError(
                f"another run is writing {path}; wait for its end, or choose another --output"
            ) from error
        os.close(fd)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (end offset, line) of every line that ends with a newline."""
    end = 0
    for line in file:
        end += len(line)
        if line.endswith(b"\n"):
            yield end, line


def _members(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (end offset, content) of every complete gzip member.

    The file is read in pieces. A piece may hold the end of one member and several whole ones;
    `unused_data` is what follows a member's end, and begins the next member.
    """
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
def _signals_deferred() -> Iterator[None]:
    """Defer signals that stop a command (Ctrl-C, SIGTERM, SIGHUP) until the block has ended."""
    came: list[int] = []
    before = {}
    try:
        # Only the main thread runs signal handlers; other threads are never interrupted.
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                # A handler of None was not installed by Python, and could not be restored.
                if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                    before[number] = handler
                    signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)
