"""Reads a Hugging Face checkpoint tensor by tensor. Safetensors only; pickle is refused.

Each read maps the file, copies one tensor and lets go, so memory peaks at one tensor. Weights of
one name in the checkpoint are rows of one tensor there, in the order of the family's WEIGHT_NAMES.
In a packed checkpoint (packed_checkpoint.py) matrices are uint8 as stores keep them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexgen_ray.model_config import ModelConfig
from flexgen_ray.models.registry import FAMILIES
from flexgen_ray.quant.packing import packed_bytes


class Kept(Protocol):
    """How weights are to be kept; bits of a packed one, None for another."""

    def bits_of(self, name: str, shape: tuple[int, ...]) -> int | None: ...


class Checkpoint:
    """A model folder's tensors under this project's names."""

    num_readers = 1  # copies of a mapped file use all cores as it is

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder = Path(folder)
        self._config = config
        self._names = FAMILIES[config.family].WEIGHT_NAMES
        self._packed: set[str] = set()
        self._files, self._shapes = self._index()

    def check(self, layer: int, tensors: dict[str, tuple[int, ...]], kept: Kept) -> None:
        """ValueError if a tensor of the layer is missing, has another shape, or is packed already
        and not as it is to be kept."""
        for name, shape in tensors.items():
            found, (_, count) = self._shapes[self.key(layer, name)], self._rows(layer, name)
            whole = count, *shape[1:]
            if self.is_packed(layer, name):
                bits = kept.bits_of(name, shape)
                if bits is None or found != (*whole[:-1], packed_bytes(shape[-1], bits)):
                    raise ValueError(
                        f"{self.folder}: {self.key(layer, name)} is packed into other bits "
                        f"than {bits}; leave the bits to the checkpoint, or take the original one"
                    )
            elif found != whole:
                raise ValueError(
                    f"{self.folder}: {self.key(layer, name)} has shape {list(found)}, "
                    f"but config.json makes it {list(whole)}"
                )

    def is_packed(self, layer: int, name: str) -> bool:
        """Whether a tensor is packed already."""
        return self.key(layer, name) in self._packed

    def read_into(self, layer: int, name: str, destination: Tensor) -> None:
        """Copies one tensor, converting it to the destination's dtype.

        ValueError if it has what is no number there: a NaN, an infinity, or too much for the dtype.
        """
        key, (rows, count) = self.key(layer, name), self._rows(layer, name)
        with _open(self._files[key]) as file:
            is_whole = count == rows.stop - rows.start
            values = file.get_tensor(key) if is_whole else file.get_slice(key)[rows]
            destination.copy_(values)
            if destination.is_floating_point() and not _is_finite(values, destination):
                raise ValueError(f"{self._files[key]}: {key} {_fault(values, destination)}")

    def key(self, layer: int, name: str) -> str:
        """The name of a tensor in the checkpoint; ValueError if it has none."""
        module, _, kind = name.rpartition(".")
        key = f"{self._names[module].format(layer - 1)}.{kind}"
        # Checkpoints of the bare model, as OPT was first published, lack the prefix.
        for candidate in (key, key.removeprefix("model.")):
            if candidate in self._files:
                return candidate
        raise ValueError(f"{self.folder}: no safetensors file holds the tensor {key}")

    def _rows(self, layer: int, name: str) -> tuple[slice, int]:
        """Which rows a weight is of its tensor in the checkpoint, and how many that one has."""
        module, _, kind = name.rpartition(".")
        shapes, start, count = self._config.tensors(layer), 0, 0
        for other, key in self._names.items():
            if key == self._names[module]:
                start = count if other == module else start
                count += shapes[f"{other}.{kind}"][0]
        return slice(start, start + shapes[name][0]), count

    def _index(self) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self._shards():
            with _open(path) as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    files[key] = path
                    shapes[key] = tuple(file.get_slice(key).get_shape())
                    if file.get_slice(key).get_dtype() == "U8":
                        self._packed.add(key)
        return files, shapes

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            shards = [self.folder / name for name in sorted(_listed(index))]
        else:
            shards = sorted(self.folder.glob("*.safetensors"))
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]} does not exist, though {index.name} lists it")
        if not shards:
            pickled = any(self.folder.glob("*.bin"))
            raise FileNotFoundError(
                f"{self.folder} holds no *.safetensors file"
                + ("; its .bin files are pickles" if pickled else "; .bin files are pickles")
                + ", which are never loaded: convert them with transformers, as in "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )  # fmt: skip
        return shards


def _listed(index: Path) -> set[str]:
    """The files that the index of a checkpoint of several names."""
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is damaged: it has no weight_map of tensors to files ({error}); download it "
            "again"
        ) from error


def _is_finite(values: Tensor, copied: Tensor) -> bool:
    """One pass, over the narrower of the two, where what is beyond its dtype is infinite."""
    widens = copied.dtype == torch.float32 and values.dtype in (torch.float16, torch.bfloat16)
    seen = values if widens and copied.device.type == "cpu" else copied
    # Both extremes are NaN if any value is.
    return bool(torch.stack(torch.aminmax(seen)).isfinite().all())


def _fault(values: Tensor, copied: Tensor) -> str:
    """What is wrong with a tensor's values, or with their copy in another dtype, and the remedy."""
    count, wrong = values.numel(), int(values.isfinite().logical_not().sum())
    if wrong:
        nans = int(values.isnan().sum())
        return (
            f"holds {nans} NaN and {wrong - nans} infinite values of {count}, which make every "
            "answer nonsense; download it again, or take another checkpoint"
        )
    wrong, dtype = int(copied.isfinite().logical_not().sum()), copied.dtype
    return (
        f"holds {wrong} values of {count} beyond {torch.finfo(dtype).max:g}, the most that "
        f"{str(dtype).removeprefix('torch.')} can hold; take --dtype bfloat16 or float32"
    )


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is truncated or damaged: download it again"
        ) from error
