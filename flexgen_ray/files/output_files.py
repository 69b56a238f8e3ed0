"""Files that a command writes: checked before the run, and replaced as a whole or not at all.

The checks refuse an output that can't be created, and one that is also read or written under
another option. Knows paths and inodes; the content of a file is opaque here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import IO

from flexgen_ray.files.input_lines import STANDARD_STREAM


def sidecar_paths(output: Path) -> list[Path]:
    """Return the paths of the files that a job keeps beside its output.

    They are the description of the job, a draft of that description, and rows that wait for their
    turn (batch/journal.py).
    """
    if output == STANDARD_STREAM or not output.name:  # a folder, such as ".", is refused elsewhere
        return []
    return [output.parent / f"{output.name}.{kind}" for kind in ("job.json", "job.tmp", "waiting")]


def check_folders(written: Mapping[str, Path]) -> None:
    """Refuse output files that can't be created.

    written: path by the option that names it, such as "--output".
    Raises OSError if the folder is missing or read-only, or if the path itself is a folder.
    """
    for option, path in written.items():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} does not exist; make it first")
        if path.is_dir():
            raise IsADirectoryError(f"{option} {path}: Is a directory; give a file")
        if not path.exists() and not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} can't be written to; give {option} another place")


def check_distinct(written: Mapping[str, Path], read: Mapping[str, Path]) -> None:
    """Refuse to write one file under two options, or to overwrite a file that is read.

    Sees through symlinks and hard links.
    written, read: path by the option that names it. A folder in `read` stands for all its files.
    Raises ValueError, naming both options.
    """
    for one, other in combinations(written, 2):
        if _identity(written[one], 1) & _identity(written[other], 1):
            raise ValueError(f"{one} and {other} both write {written[other]}; give each its own")
    for option, path in written.items():
        for source, taken in read.items():
            if _identity(path, 1) & _identity(taken, 0) or _is_file_of(taken, path):
                raise ValueError(
                    f"{option} {path} would overwrite what {source} reads; choose another {option}"
                )


def write_text(path: Path, text: str, draft: Path | None = None) -> None:
    """Replace a file's content in one step, as `atomic_write` does. Raises OSError if it can't."""
    with atomic_write(path, draft=draft) as file:
        file.write(text)


@contextmanager
def atomic_write(path: Path, mode: str = "w", draft: Path | None = None) -> Iterator[IO]:
    """Yield a draft file that replaces `path` when the block ends without an error.

    After an error or a kill, `path` is as it was.
    mode: "w" (UTF-8) or "wb".
    draft: path of the draft, of which a killed run may have left an old one; None for a random
    name. Devices and pipes are written directly.
    """
    encoding = None if "b" in mode else "utf-8"
    if path.parts[:2] in (("/", "dev"), ("/", "proc")) or (path.exists() and not path.is_file()):
        with path.open(mode, encoding=encoding) as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    if draft is None:
        draft = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}")
    draft.unlink(missing_ok=True)
    descriptor = create_new(draft)
    try:
        with os.fdopen(descriptor, mode, encoding=encoding) as file:
            if target.exists():
                os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(descriptor)
        try:
            draft.replace(target)
        except OSError:
            # A single file that is mounted, as into a container, can't be renamed over.
            shutil.copyfile(draft, target)
            draft.unlink()
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def create_new(path: Path) -> int:
    """Create a file and return its descriptor.

    Raises FileExistsError if anything has that name, a dangling symlink included.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def _identity(path: Path, descriptor: int) -> set:
    """Return the identities of a regular file or folder: (device, inode) and resolved path.

    Two paths are the same file if they share an identity. A file that doesn't exist yet has its
    resolved path only; devices and pipes have no identity, since many may write them.
    descriptor: the standard stream that `-` stands for, 0 or 1.
    """
    with suppress(OSError):
        status = os.fstat(descriptor) if path == STANDARD_STREAM else path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            return set()
        names: set = {(status.st_dev, status.st_ino)}
        return names if path == STANDARD_STREAM else names | {os.path.realpath(path)}
    return {os.path.realpath(path)} - {os.path.realpath(STANDARD_STREAM)}


def _is_file_of(folder: Path, path: Path) -> bool:
    """Return whether the path is an existing file within the folder."""
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    return inside and folder.is_dir() and path.is_file()
