"""Reads text files that users wrote, with any editor.

Files are UTF-8, with or without a byte order mark; a line ends at \\n or \\r\\n and nowhere else.
YAML that would take much more memory or stack than its size is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

UTF8_MARK = b"\xef\xbb\xbf"
MAX_YAML_BYTES = 2**18
MAX_YAML_DEPTH = 32
MAX_YAML_VALUES = 10_000
# Byte order marks of other encodings. UTF-32's come first, since one begins with UTF-16's.
_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def check_encoding(start: bytes, name: str) -> None:
    """Raise ValueError, with the remedy, if a file's first bytes show that it isn't UTF-8 text.

    start: the first four bytes or more. name: the file's name for the error.
    """
    if start.startswith(b"\x1f\x8b"):
        raise ValueError(
            f"{name} is compressed by gzip; give it a name that ends in .gz, or decompress it"
        )
    encoding = next((kind for mark, kind in _ENCODINGS if start.startswith(mark)), None)
    # ASCII in UTF-16 without a mark: every other byte is zero.
    if encoding is None and b"\x00" in start[:2] and len(start) > 1:
        encoding = "UTF-16LE" if start[1] == 0 else "UTF-16BE"
    if encoding is not None:
        raise ValueError(
            f"{name} is in {encoding}, but must be in UTF-8; convert it, as with "
            f"`iconv -f {encoding} -t UTF-8`"
        )


def read_text(path: str | Path) -> str:
    """Return a file's text with \\n at line ends. Raises OSError or ValueError, naming the file."""
    content = Path(path).read_bytes()
    check_encoding(content[:4], str(path))
    try:
        text = content.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 (byte {error.start}); convert it") from error
    return text.replace("\r\n", "\n")


def read_lines(path: str | Path) -> list[str]:
    """Return a file's lines without their ends. Raises OSError or ValueError, naming the file."""
    return read_text(path).removesuffix("\n").split("\n")


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file.

    Raises OSError or ValueError, naming the file, if it can't be read, is too large, or would
    exhaust memory or stack (deep nesting, aliases of aliases).
    """
    size = Path(path).stat().st_size
    if size > MAX_YAML_BYTES:
        raise ValueError(f"{path} has {size} bytes; settings have {MAX_YAML_BYTES} at most")
    text = read_text(path)
    try:
        _check_events(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_events(text: str) -> None:
    """Raise ValueError for YAML that is too deep, or has too many values once aliases are expanded.

    The parser's events are counted before any value is built: ten lists of ten aliases each, every
    one naming the list before it, would be ten billion values.
    """
    sizes: dict[str, int] = {}  # number of values under each anchor
    open_ones: list[tuple[str | None, int]] = []  # (anchor, count before it) of open collections
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            # An alias of a collection that is still open contains itself: it has no end.
            count += sizes.get(anchor or "", MAX_YAML_VALUES)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            sizes |= {anchor: 1} if anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            sizes |= {anchor: count - before} if anchor else {}
        if len(open_ones) > MAX_YAML_DEPTH:
            raise ValueError(f"values lie more than {MAX_YAML_DEPTH} deep in each other")
        if count > MAX_YAML_VALUES:
            raise ValueError(f"it has more than {MAX_YAML_VALUES} values, or aliases of as many")
