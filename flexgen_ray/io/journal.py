"""The output file: each result appended whole, as it finishes, so a kill loses nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path


class Journal:
    """An append-only file of JSON lines. Use as a context manager."""

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        """FileExistsError if the file has content and may not be overwritten."""
        self.check(path, overwrite)
        self.path = Path(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_TRUNC
        self._fd = os.open(self.path, flags, 0o644)

    @staticmethod
    def check(path: str | Path, overwrite: bool) -> None:
        """The same refusal, before any work is done for nothing."""
        if not overwrite and Path(path).is_file() and Path(path).stat().st_size:
            raise FileExistsError(
                f"{path} already has content; choose another --output, or give --overwrite"
            )

    def append(self, row: dict) -> None:
        """One line in one write; OSError names the file."""
        line = memoryview((json.dumps(row, ensure_ascii=False) + "\n").encode())
        while line:
            try:
                line = line[os.write(self._fd, line) :]
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error

    def close(self) -> None:
        """What was written to a file is on disk when this returns."""
        if self.path.is_file():
            os.fsync(self._fd)
        os.close(self._fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
