"""Files that a command writes: none is another file that it reads or writes, and each is replaced
as a whole or not at all.

Knows paths and inodes; not what a file says.
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
    """The files that a job keeps beside its output: what it is, a draft of that, waiting rows."""
    if output == STANDARD_STREAM or not output.name:  # a folder, such as ".", is refused elsewhere
        return []
    return [output.parent / f"{output.name}.{kind}" for kind in ("job.json", "job.tmp", "waiting")]


def check_folders(written: Mapping[str, Path]) -> None:
    """Refuses files, by the option that gives them, that can't be made where they are to be.

    Raises OSError for a folder that is missing or read-only, or that has the file's own name.
    """
    for option, path in written.items():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} does not exist; make it first")
        if path.is_dir():
            raise IsADirectoryError(f"{option} {path}: Is a directory; give a file")
        if not path.exists() and not os.access(path.parent, os.W_OK):
            raise PermissionError(f"{path.parent} can't be written to; give {option} another place")


def check_distinct(written: Mapping[str, Path], read: Mapping[str, Path]) -> None:
    """Refuses to write one file twice, or one that is read, also by a symlink or hard link.

    written, read: paths by the option that gives them. A folder in `read` stands for its files.
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
    """Replaces a file's content as a whole, as `replacing`; OSError if that can't be done."""
    with atomic_write(path, draft=draft) as file:
        file.write(text)


@contextmanager
def atomic_write(path: Path, mode: str = "w", draft: Path | None = None) -> Iterator[IO]:
    """A file that takes the place of `path` when the block ends without an error.

    mode: "w" (UTF-8) or "wb". draft: the file's name until then, of which a killed run may have
    left one; a new name if None. Devices and pipes are written directly.
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
    """A descriptor of a new file; FileExistsError if anything, a symlink too, has that name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def _identity(path: Path, descriptor: int) -> set:
    """Names by which a regular file is known, there or to be made; devices and pipes have none.

    descriptor: of the standard stream that `-` stands for.
    """
    with suppress(OSError):
        status = os.fstat(descriptor) if path == STANDARD_STREAM else path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            return set()
        names: set = {(status.st_dev, status.st_ino)}
        return names if path == STANDARD_STREAM else names | {os.path.realpath(path)}
    return {os.path.realpath(path)} - {os.path.realpath(STANDARD_STREAM)}


def _is_file_of(folder: Path, path: Path) -> bool:
    """True if a path is one of a folder's files already."""
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    return inside and folder.is_dir() and path.is_file()
