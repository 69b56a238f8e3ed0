"""Reads files into the kernel's page cache, or asks it to forget them. Linux."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

_PIECE = 16 * 2**20


def read_once(files: Iterable[Path]) -> None:
    """Leaves the files in the page cache, as far as memory allows."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(_PIECE):
                pass


def drop(files: Iterable[Path]) -> None:
    """Takes the files out of the page cache; pages that a process has mapped stay."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # Dirty pages would stay.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def files_in(folder: str) -> list[Path]:
    """A folder's files, and those without a name in it that this process has open."""
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    for link in Path("/proc/self/fd").iterdir():
        try:
            is_file = stat.S_ISREG(link.stat().st_mode)
            if is_file and os.readlink(link).startswith(f"{folder}/") and not link.samefile(folder):
                found.append(link)
        except FileNotFoundError:  # closed since, as is the listing's own descriptor
            continue
    return found
