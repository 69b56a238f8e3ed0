"""Disk tier of a stage: offload files, read and written past the page cache where possible.

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

from flexgen_ray.layout.placement import SECTOR, aligned
from flexgen_ray.store.memory import Ledger, allocate_mapping
from flexgen_ray.units import format_bytes

# Size of one request; measured: larger ones, or several at a time, are hardly faster.
REQUEST_BYTES = 8 * 2**20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Region:
    """Whole sectors of an offload file, from byte `start` on.

    is_direct: True if requests bypass the page cache (O_DIRECT). Either all requests of a file do,
    or none, so that the page cache never has an older copy of its bytes. Methods raise ValueError
    after the file has been closed.
    """

    file: FileIO | None
    path: str
    start: int
    nbytes: int
    is_direct: bool = False

    def read_into(self, buffer: Tensor, offset: int = 0) -> None:
        """Fill a contiguous host tensor from `offset` of the region.

        Whole sectors are read directly into memory that is aligned to them; other requests go
        through a buffer of whole sectors around them. Raises OSError with the folder's name.
        """
        view = _bytes_of(buffer)
        self._check(offset, len(view))
        if not self.is_direct or _are_sector_multiples(buffer.data_ptr(), offset, len(view)):
            self._transfer(os.preadv, view, offset)
            return
        end = offset + len(view)
        for at in range(offset // SECTOR * SECTOR, end, REQUEST_BYTES):
            sectors = _bytes_of(allocate_mapping(min(REQUEST_BYTES, aligned(end - at, SECTOR))))
            self._transfer(os.preadv, sectors, at)
            low, high = max(at, offset), min(at + len(sectors), end)
            view[low - offset : high - offset] = sectors[low - at : high - at]

    def write(self, buffer: Tensor, offset: int = 0) -> None:
        """Write a contiguous host tensor of whole sectors at `offset`, the start of a sector.

        A tensor that is not aligned to sectors in memory is copied first. Raises OSError with the
        folder's name.
        """
        view = _bytes_of(buffer)
        self._check(offset, len(view))
        assert _are_sector_multiples(offset, len(view)), "a write of less than whole sectors"
        if not self.is_direct or _are_sector_multiples(buffer.data_ptr()):
            self._transfer(os.pwritev, view, offset)
            return
        for at in range(0, len(view), REQUEST_BYTES):
            sectors = _bytes_of(allocate_mapping(min(REQUEST_BYTES, len(view) - at)))
            sectors[:] = view[at : at + len(sectors)]
            self._transfer(os.pwritev, sectors, offset + at)

    def part(self, start: int, nbytes: int) -> Region:
        """A region inside this one, of whole sectors."""
        self._check(start, nbytes)
        assert _are_sector_multiples(start, nbytes), "a region of less than whole sectors"
        return Region(self.file, self.path, self.start + start, nbytes, self.is_direct)

    def _transfer(self, request: Callable, view: memoryview, offset: int) -> None:
        """Read or write all of `view` in requests of at most REQUEST_BYTES."""
        assert self.file is not None, "an empty region has no bytes"
        done, verb = 0, "read" if request is os.preadv else "write"
        while done < len(view):
            at = self.start + offset + done
            piece = view[done : done + REQUEST_BYTES]
            try:
                count = request(self.file.fileno(), [piece], at)
            except OSError as error:
                raise self._failure(verb, len(piece), at, error.errno) from error
            if count == 0:
                raise self._failure(verb, len(piece), at, None)
            done += count

    def _failure(self, verb: str, nbytes: int, at: int, number: int | None) -> OSError:
        reason = os.strerror(number) if number else "the file ends before"
        remedy = "free space there" if number == errno.ENOSPC else "check that disk"
        return OSError(
            number or errno.EIO,
            f"cannot {verb} {nbytes} bytes at byte {at} of an offload file ({reason}); "
            f"{remedy}, or choose another --offload-dir",
            self.path,
        )

    def _check(self, offset: int, nbytes: int) -> None:
        if self.file is not None:
            self.file.fileno()  # ValueError once it is closed
        assert 0 <= offset and offset + nbytes <= self.nbytes, "access beyond an offload region"


class DiskTier(Ledger):
    """Allocates nameless offload files in a folder; Linux frees them however the run ends."""

    def __init__(self, budget: int, folder: Path) -> None:
        super().__init__("disk", budget)
        self.folder = folder
        self._files: list[FileIO] = []

    def allocate(self, what: str, nbytes: int) -> Region:
        """Allocate whole sectors, and reserve their blocks on disk.

        Raises BudgetError beyond the budget, and OSError if the file system has no room.
        """
        assert _are_sector_multiples(nbytes), "space of less than whole sectors"
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
        """Close all files, which frees their space."""
        while self._files:
            self._files.pop().close()

    def _nameless_file(self) -> int:
        """Open a file without a name in the folder, or unlink one where O_TMPFILE is missing."""
        try:
            return os.open(self.folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        fd, path = tempfile.mkstemp(prefix="flexgen-offload-", dir=self.folder)
        os.unlink(path)
        return fd


def enable_direct_io(fd: int) -> bool:
    """Turn on direct requests (O_DIRECT); returns False if the file system or disk refuses them.

    Some refuse the flag, others a request of one sector; the file must have that sector.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [_bytes_of(allocate_mapping(SECTOR))], 0)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _bytes_of(tensor: Tensor) -> memoryview:
    """View of a contiguous host tensor's bytes."""
    assert tensor.is_contiguous()
    return memoryview(tensor.view(uint8).reshape(-1).numpy().data)


def _are_sector_multiples(*numbers: int) -> bool:
    return all(number % SECTOR == 0 for number in numbers)
