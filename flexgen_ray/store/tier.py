"""The three tiers: memory and disk handed out under a budget that is never exceeded.

Knows bytes and where they lie; not what they mean.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from flexgen_ray.units import format_bytes

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class BudgetError(ValueError):
    """A tier was asked for more than its budget."""


class Ledger:
    """What a tier has given out, by purpose, against its budget."""

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.used: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.used.values())

    def book(self, what: str, nbytes: int) -> None:
        """BudgetError if the tier can't take it."""
        if self.total + nbytes > self.budget:
            raise BudgetError(
                f"{what} needs {format_bytes(nbytes)} on the {self.name} tier, where "
                f"{format_bytes(self.budget - self.total)} of {format_bytes(self.budget)} is free; "
                f"raise --{self.name}-memory"
            )
        self.used[what] = self.used.get(what, 0) + nbytes


class MemoryTier(Ledger):
    """Zeroed memory of a torch device; without CUDA the gpu tier is plain memory too."""

    def __init__(self, name: str, budget: int, device: torch.device) -> None:
        super().__init__(name, budget)
        self.device = device

    def allocate(self, what: str, nbytes: int) -> Tensor:
        """A zeroed uint8 tensor of exactly nbytes; on the host it is a mapping, page-aligned."""
        self.book(what, nbytes)
        if self.device.type != "cpu" or not nbytes:
            return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
        # A mapping of its own is page-aligned, costs nothing until touched, and is returned whole.
        return torch.frombuffer(mmap.mmap(-1, nbytes, _PRIVATE), dtype=torch.uint8)


@dataclass(frozen=True)
class Region:
    """Bytes start..start + nbytes of an offload file; ValueError once the file is closed."""

    file: FileIO | None
    path: str
    start: int
    nbytes: int

    def read_into(self, buffer: Tensor, offset: int = 0) -> None:
        """Fills a contiguous host tensor from `offset` of the region; OSError names the folder."""
        view = memoryview(buffer.view(torch.uint8).reshape(-1).numpy().data)
        self._check(offset, len(view))
        while view:
            count = os.preadv(self._fd, [view], self.start + offset)
            if count == 0:
                raise OSError(errno.EIO, "short read from the offload file", self.path)
            view, offset = view[count:], offset + count

    def write(self, buffer: Tensor, offset: int = 0) -> None:
        """Writes a contiguous host tensor at `offset` of the region; OSError names the folder."""
        view = memoryview(buffer.view(torch.uint8).reshape(-1).numpy().data)
        self._check(offset, len(view))
        while view:
            count = os.pwritev(self._fd, [view], self.start + offset)
            view, offset = view[count:], offset + count

    def part(self, start: int, nbytes: int) -> Region:
        """A region inside this one."""
        self._check(start, nbytes)
        return Region(self.file, self.path, self.start + start, nbytes)

    @property
    def _fd(self) -> int:
        assert self.file is not None, "an empty region has no bytes"
        return self.file.fileno()

    def _check(self, offset: int, nbytes: int) -> None:
        assert 0 <= offset and offset + nbytes <= self.nbytes, "access beyond an offload region"


class DiskTier(Ledger):
    """Offload files in a folder, without names: the kernel frees them however the run ends."""

    def __init__(self, budget: int, folder: Path) -> None:
        super().__init__("disk", budget)
        self.folder = folder
        self._files: list[FileIO] = []

    def allocate(self, what: str, nbytes: int) -> Region:
        """Space that is really there: OSError if the file system can't hold it."""
        self.book(what, nbytes)
        if not nbytes:
            return Region(None, str(self.folder), 0, 0)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = FileIO(self._nameless_file(), "r+")
        self._files.append(file)
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot reserve {format_bytes(nbytes)} for {what} "
                f"({os.strerror(error.errno or 0)}); free space there, lower the disk "
                "fractions, or choose another --offload-dir",
                str(self.folder),
            ) from error
        return Region(file, str(self.folder), 0, nbytes)

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


@dataclass
class Tiers:
    """The three tiers of one stage."""

    gpu: MemoryTier
    cpu: MemoryTier
    disk: DiskTier

    @property
    def device(self) -> torch.device:
        return self.gpu.device

    def used(self) -> dict[str, dict[str, int]]:
        """{tier: {what: bytes}}, as booked."""
        return {tier.name: dict(tier.used) for tier in (self.gpu, self.cpu, self.disk)}
