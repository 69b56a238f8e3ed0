"""Reads lines from a file, a gzip file or standard input, in bounded memory.

Knows bytes; the content of a line is opaque here.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from flexgen_ray.files.text_files import UTF8_MARK, check_encoding

STANDARD_STREAM = Path("-")  # on the command line: standard input or standard output
MAX_LINE_BYTES = 16 * 2**20
_PIECE_BYTES = 2**20


class InputLines:
    """Iterator over the lines of a stream, with a hash of all bytes that were read.

    A line longer than MAX_LINE_BYTES is cut to MAX_LINE_BYTES + 1 bytes, so that the reader can
    tell that it is too long. Iterating raises ValueError if the stream is damaged or is not UTF-8.
    """

    def __init__(self, stream: BinaryIO, name: str = "the input") -> None:
        self._stream = stream
        self._name = name
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        is_first = True
        while line := self._read(MAX_LINE_BYTES + 1):
            # Read the rest of a line that was cut, for the hash, and drop it.
            piece = line
            while piece and not piece.endswith(b"\n"):
                piece = self._read(_PIECE_BYTES)
            if is_first:
                check_encoding(line[:4], self._name)
                line, is_first = line.removeprefix(UTF8_MARK), False
            yield line

    def sha256(self) -> str:
        """Return the SHA-256 of everything read so far, including the parts of lines cut off."""
        return self._hash.hexdigest()

    def _read(self, size: int) -> bytes:
        try:
            piece = self._stream.readline(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self._name} is truncated or damaged ({error}); make it again"
            ) from error
        self._hash.update(piece)
        return piece


@contextmanager
def open_input(path: Path) -> Iterator[InputLines]:
    """Open an input for reading by lines. `-` is standard input; `.gz` files are decompressed.

    Raises OSError, naming the file, if it can't be read.
    """
    if path == STANDARD_STREAM:
        yield InputLines(sys.stdin.buffer, "standard input")
        return
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; --input takes a JSONL file, or -")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; --input takes a JSONL file, or -")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        yield InputLines(cast(BinaryIO, stream), str(path))
