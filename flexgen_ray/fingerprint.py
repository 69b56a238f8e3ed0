"""Fingerprints that tell a model folder from one with changed files, in some milliseconds.

Knows files, and of safetensors the header; reads little of the weights themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

_WHOLE = (
    "config.json", "generation_config.json", "chat_template*", "tokenizer*", "*.model",
    "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.index.json",
)  # fmt: skip
_WEIGHTS = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def fingerprint(folder: Path) -> dict[str, str]:
    """A digest of each file of a model that answers depend on, by name.

    Small files are read whole. Of safetensors the digest covers the size, the header (names,
    shapes, dtypes and offsets of tensors) and sixteen places of the values: weights that were
    trained further have the same header.
    """
    whole = {path for pattern in _WHOLE for path in folder.glob(pattern) if path.is_file()}
    has_one = (folder / _WEIGHTS).is_file()
    weights = [folder / _WEIGHTS] if has_one else sorted(folder.glob("*.safetensors"))
    found = {path.name: _digest([path.read_bytes()]) for path in sorted(whole)}
    return found | {path.name: _digest(_parts(path)) for path in weights}


def _digest(parts: Iterator[bytes] | list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(path: Path) -> Iterator[bytes]:
    """The size of a safetensors file, its header, and a few pieces of its values."""
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES)
        yield file.read(length)
        last = max(size - 8 - length - _SAMPLE_BYTES, 0)
        for sample in range(_SAMPLES):
            file.seek(8 + length + last * sample // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
