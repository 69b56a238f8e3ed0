"""Text files that people give: one way to read them, whatever editor wrote them.

UTF-8, with or without a mark at the start; a line ends at \\n or \\r\\n and nowhere else. YAML is
refused where it would take much more memory or stack than its size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

UTF8_MARK = b"\xef\xbb\xbf"
MAX_YAML_BYTES = 2**18
MAX_YAML_DEPTH = 32
MAX_YAML_VALUES = 10_000
# First bytes of other encodings; the longer ones first.
_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def check_encoding(start: bytes, name: str) -> None:
    """ValueError, with the remedy, if a file that starts so is no UTF-8 text."""
    if start.startswith(b"\x1f\x8b"):
        raise ValueError(f"{name} is packed by gzip; give it a name that ends in .gz, or unpack it")
    found = next((kind for mark, kind in _ENCODINGS if start.startswith(mark)), None)
    if found is None and b"\x00" in start[:2] and len(start) > 1:
        little = start[1] == 0
        found = "UTF-16LE" if little else "UTF-16BE"
    if found is not None:
        raise ValueError(
            f"{name} is in {found}, but must be in UTF-8; convert it, as with "
            f"`iconv -f {found} -t UTF-8`"
        )


def read_text(path: str | Path) -> str:
    """A file's text, with \\n at line ends; OSError or ValueError, naming the file."""
    content = Path(path).read_bytes()
    check_encoding(content[:4], str(path))
    try:
        text = content.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 (byte {error.start}); convert it") from error
    return text.replace("\r\n", "\n")


def read_lines(path: str | Path) -> list[str]:
    """A file's lines without their ends, as `read_text`."""
    return read_text(path).removesuffix("\n").split("\n")


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises OSError or ValueError, naming the file, for one that can't be read, is too large, or is
    made to exhaust its reader.
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
    """ValueError for YAML that is too deep, or has too many values once aliases are followed."""
    sizes: dict[str, int] = {}  # values behind each anchor
    open_ones: list[tuple[str | None, int]] = []  # (anchor, values before it) of what is open
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            count += sizes.get(anchor or "", MAX_YAML_VALUES)  # one in itself has no end
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
