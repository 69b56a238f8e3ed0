"""Puts files into the kernel's page cache, or takes them out of it. Linux."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

_PIECE = 16 * 2**20


def read_once(files: Iterable[Path]) -> None:
    """Read the files, which leaves them in the page cache as far as memory allows."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(_PIECE):
                pass


def drop(files: Iterable[Path]) -> None:
    """Take the files out of the page cache; pages that a process has mapped stay."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # dirty pages would stay in the cache
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def files_in(folder: str) -> list[Path]:
    """A folder's files, with deleted ones that this process has open."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    for link in Path("/proc/self/fd").iterdir():
        try:
            is_file = stat.S_ISREG(link.stat().st_mode)
            if is_file and os.readlink(link).startswith(f"{folder}/") and not link.samefile(folder):
                paths.append(link)
        except FileNotFoundError:  # closed meanwhile, such as the listing's own descriptor
            continue
    return paths
