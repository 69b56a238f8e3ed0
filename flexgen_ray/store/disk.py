"""Offload files: space on disk, and requests that bypass the page cache where they can.

Knows bytes and where they lie; not what they mean.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from torch import Tensor, uint8

from flexgen_ray.layout.placement import PAGE, aligned
from flexgen_ray.store.memory import Ledger, allocate_pages
from flexgen_ray.units import format_bytes

# Bytes of one request; measured: larger ones, or several at once, are hardly faster.
REQUEST_BYTES = 8 * 2**20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Region:
    """Whole pages from byte `start` of an offload file; ValueError once the file is closed.

    is_direct: requests bypass the page cache. All of a file's do or none, so that there is never
    a second, older copy of its bytes.
    """

    file: FileIO | None
    path: str
    start: int
    nbytes: int
    is_direct: bool = False

    def read_into(self, buffer: Tensor, offset: int = 0) -> None:
        """Fills a contiguous host tensor from `offset` of the region; OSError names the folder.

        Whole pages into page-aligned memory are read in place, others through a few pages more.
        """
        view = _bytes_of(buffer)
        self._check(offset, len(view))
        if not self.is_direct or _in_pages(buffer.data_ptr(), offset, len(view)):
            self._transfer(os.preadv, view, offset)
            return
        end = offset + len(view)
        for at in range(offset // PAGE * PAGE, end, REQUEST_BYTES):
            pages = _bytes_of(allocate_pages(min(REQUEST_BYTES, aligned(end - at, PAGE))))
            self._transfer(os.preadv, pages, at)
            low, high = max(at, offset), min(at + len(pages), end)
            view[low - offset : high - offset] = pages[low - at : high - at]

    def write(self, buffer: Tensor, offset: int = 0) -> None:
        """Writes a contiguous host tensor of whole pages at `offset`, a page's start.

        OSError names the folder. What isn't page-aligned in memory is copied first.
        """
        view = _bytes_of(buffer)
        self._check(offset, len(view))
        assert _in_pages(offset, len(view)), "a write of less than whole pages"
        if not self.is_direct or _in_pages(buffer.data_ptr()):
            self._transfer(os.pwritev, view, offset)
            return
        for at in range(0, len(view), REQUEST_BYTES):
            pages = _bytes_of(allocate_pages(min(REQUEST_BYTES, len(view) - at)))
            pages[:] = view[at : at + len(pages)]
            self._transfer(os.pwritev, pages, offset + at)

    def part(self, start: int, nbytes: int) -> Region:
        """A region inside this one."""
        self._check(start, nbytes)
        assert _in_pages(start, nbytes), "a region of less than whole pages"
        return Region(self.file, self.path, self.start + start, nbytes, self.is_direct)

    def _transfer(self, request: Callable, view: memoryview, offset: int) -> None:
        assert self.file is not None, "an empty region has no bytes"
        done, doing = 0, "read" if request is os.preadv else "write"
        while done < len(view):
            at = self.start + offset + done
            piece = view[done : done + REQUEST_BYTES]
            try:
                count = request(self.file.fileno(), [piece], at)
            except OSError as error:
                raise self._failure(doing, len(piece), at, error.errno) from error
            if count == 0:
                raise self._failure(doing, len(piece), at, None)
            done += count

    def _failure(self, doing: str, nbytes: int, at: int, number: int | None) -> OSError:
        reason = os.strerror(number) if number else "the file ends before"
        remedy = "free space there" if number == errno.ENOSPC else "check that disk"
        return OSError(
            number or errno.EIO,
            f"cannot {doing} {nbytes} bytes at byte {at} of an offload file ({reason}); "
            f"{remedy}, or choose another --offload-dir",
            self.path,
        )

    def _check(self, offset: int, nbytes: int) -> None:
        if self.file is not None:
            self.file.fileno()  # ValueError once it is closed
        assert 0 <= offset and offset + nbytes <= self.nbytes, "access beyond an offload region"


class DiskTier(Ledger):
    """Offload files in a folder, without names: the kernel frees them however the run ends."""

    def __init__(self, budget: int, folder: Path) -> None:
        super().__init__("disk", budget)
        self.folder = folder
        self._files: list[FileIO] = []

    def allocate(self, what: str, nbytes: int) -> Region:
        """Whole pages that are really there: OSError if the file system can't hold them."""
        assert _in_pages(nbytes), "space of less than whole pages"
        self.book(what, nbytes)
        if not nbytes:
            return Region(None, str(self.folder), 0, 0)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = FileIO(self._nameless_file(), "r+")
        self._files.append(file)
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            self.close()
            free = format_bytes(shutil.disk_usage(self.folder).free)
            raise OSError(
                error.errno,
                f"cannot reserve {format_bytes(nbytes)} for {what} "
                f"({os.strerror(error.errno or 0)}; {free} is free); free space there, lower "
                "--disk-memory or the disk fractions, or choose another --offload-dir",
                str(self.folder),
            ) from error
        is_direct = enable_direct_io(file.fileno())
        if not is_direct and len(self._files) == 1:
            _log.warning(
                "%s takes no direct requests (O_DIRECT): offloaded data also fills the page cache, "
                "beside --cpu-memory; choose an --offload-dir on a local disk if memory is short",
                self.folder,
            )
        return Region(file, str(self.folder), 0, nbytes, is_direct)

    def close(self) -> None:
        """Gives the space back."""
        while self._files:
            self._files.pop().close()

    def _nameless_file(self) -> int:
        try:
            return os.open(self.folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        fd, path = tempfile.mkstemp(prefix="flexgen-offload-", dir=self.folder)
        os.unlink(path)
        return fd


def enable_direct_io(fd: int) -> bool:
    """Asks for direct requests (O_DIRECT); False where the file system or its disk refuses them.

    Some refuse when asked, others a request of one page; the file must have that page.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [_bytes_of(allocate_pages(PAGE))], 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous host tensor."""
    assert tensor.is_contiguous()
    return memoryview(tensor.view(uint8).reshape(-1).numpy().data)


def _in_pages(*numbers: int) -> bool:
    return all(number % PAGE == 0 for number in numbers)
