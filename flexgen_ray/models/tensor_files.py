"""Finds the file of each tensor in a model folder, by the rules of transformers.

Reads file names, indexes and safetensors headers; never a tensor's values. Also opens and saves
safetensors files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_MAX_INDEX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint. dtype: safetensors' name of it, such as BF16 or U8."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a model folder, by its name in the checkpoint.

    As in transformers, model.safetensors is used alone if it exists, otherwise the shards that
    model.safetensors.index.json lists. Shards without an index are accepted if they are complete.
    Raises FileNotFoundError or ValueError, naming the file, for a folder without weights, a damaged
    file or index, and a tensor that two shards hold.
    """
    if (folder / WEIGHTS).is_file():
        return _merged([folder / WEIGHTS])
    index = folder / INDEX
    if not index.is_file():
        return _merged(_shards_without_index(folder))
    files = _listed(index)
    tensors = _merged(folder / name for name in sorted(set(files.values())))
    for key, name in files.items():
        if key not in tensors:
            raise ValueError(
                f"{index} says that {name} holds the tensor {key}, but it does not; download both "
                "again"
            )
    return tensors


def open_tensors(path: Path):
    """Open a safetensors file as a context manager. Raises ValueError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is truncated or damaged: download it again"
        ) from error


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions that the umask gives to new files.

    safetensors itself makes it readable by its owner alone.
    """
    save_file(tensors, path, {"format": "pt"})
    umask = os.umask(0o077)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _merged(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of several files. Raises ValueError for a tensor in two of them."""
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, though {INDEX} lists it")
        with open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in tensors:
                    raise ValueError(
                        f"{path} and {tensors[key].path.name} both hold the tensor {key}; only one "
                        "can be right: remove the other file"
                    )
                header = file.get_slice(key)
                tensors[key] = StoredTensor(path, tuple(header.get_shape()), header.get_dtype())
    return tensors


def _listed(index: Path) -> dict[str, str]:
    """Return the file name of every tensor that an index lists.

    Raises ValueError for a damaged index, and for files outside the index's own folder.
    """
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {_MAX_INDEX_BYTES // 2**20} MiB")
        files = {str(key): str(name) for key, name in _weight_map(index).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is damaged: it has no weight_map of tensors to files ({error}); download it "
            "again"
        ) from error
    for name in files.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {name!r}; only *.safetensors files in the same folder are "
                "read: take the model from elsewhere"
            )
    return files


def _weight_map(index: Path) -> dict:
    return json.loads(index.read_bytes())["weight_map"]


def _shards_without_index(folder: Path) -> list[Path]:
    """Return the shards of a folder without an index, if they are complete by their names.

    Raises FileNotFoundError, naming the files that are there, if they aren't.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors file; .bin files are pickles, which are never "
            "loaded: convert them with transformers, as in "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if shards and {int(shard[1]) for shard in shards} == {len(shards)}:
        return [folder / shard[0] for shard in shards]
    raise FileNotFoundError(
        f"{folder} has neither {WEIGHTS} nor {INDEX}, and {', '.join(names[:3])} are not the "
        f"complete shards of a model: download what is missing, or if it is the whole model, "
        f"rename it to {WEIGHTS}"
    )
