"""Reads a Hugging Face checkpoint tensor by tensor. Safetensors only; pickle is refused.

Each read maps the file, copies one tensor and lets go, so memory peaks at one tensor. Weights of
one name in the checkpoint are rows of one tensor there, in the order of the family's WEIGHT_NAMES.
In a packed checkpoint (quantized_checkpoint.py) matrices are uint8 as stores keep them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_files import load_config
from flexgen_ray.models.registry import FAMILIES
from flexgen_ray.models.tensor_files import StoredTensor, open_tensors, stored_tensors
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.packing import packed_bytes

PACKED = "U8"
_DTYPES = ("F64", "F32", "F16", "BF16", PACKED)
_COMPARED_ROWS = 4096


class Checkpoint:
    """A model folder's tensors under this project's names."""

    num_readers = 1  # copies of a mapped file use all cores as it is

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder = Path(folder)
        self._config = config
        self._names = FAMILIES[config.family].WEIGHT_NAMES
        self._tensors = stored_tensors(self.folder)

    def check(
        self, layer: int, tensors: dict[str, tuple[int, ...]], weight_format: WeightFormat
    ) -> None:
        """ValueError if a tensor of the layer is missing, has another shape or an unknown dtype, or
        is packed already and not as it is to be kept."""
        for name, shape in tensors.items():
            stored, (_, count) = self._stored(layer, name), self._rows(layer, name)
            found, whole = stored.shape, (count, *shape[1:])
            if stored.dtype not in _DTYPES:
                raise ValueError(
                    f"{stored.path}: {self.key(layer, name)} is stored as {stored.dtype}, which is "
                    "not supported; take the checkpoint in bfloat16, float16 or float32"
                )
            if self.is_packed(layer, name):
                bits = weight_format.bits_of(name, shape)
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
        return self._stored(layer, name).dtype == PACKED

    def read_into(self, layer: int, name: str, destination: Tensor) -> None:
        """Copies one tensor, converting it to the destination's dtype.

        ValueError if it has what is no number there: a NaN, an infinity, or too much for the dtype.
        """
        key, (rows, count) = self.key(layer, name), self._rows(layer, name)
        path = self._tensors[key].path
        with open_tensors(path) as file:
            is_whole = count == rows.stop - rows.start
            values = file.get_tensor(key) if is_whole else file.get_slice(key)[rows]
            destination.copy_(values)
            if destination.is_floating_point() and not _is_finite(values, destination):
                raise ValueError(f"{path}: {key} {_fault(values, destination)}")

    def key(self, layer: int, name: str) -> str:
        """The name of a tensor in the checkpoint; ValueError if it has none."""
        module, _, kind = name.rpartition(".")
        key = f"{self._names[module].format(layer - 1)}.{kind}"
        keys = [key]
        if self._config.tie_word_embeddings and module == "embed_tokens":
            keys.append(f"{self._names['lm_head']}.{kind}")  # one of the two may stand for both
        for candidate in keys:
            # Checkpoints of the bare model, as OPT was first published, lack the prefix.
            for name_there in (candidate, candidate.removeprefix("model.")):
                if name_there in self._tensors:
                    return name_there
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

    def _stored(self, layer: int, name: str) -> StoredTensor:
        return self._tensors[self.key(layer, name)]

    def has_own_head(self) -> bool:
        """True if the head's matrix is there and differs from the embedding's."""
        names = [self._names[module] + ".weight" for module in ("embed_tokens", "lm_head")]
        keys = [name if name in self._tensors else name.removeprefix("model.") for name in names]
        if not all(key in self._tensors for key in keys):
            return False
        embedding, head = (self._tensors[key] for key in keys)
        if embedding.shape != head.shape or embedding.dtype != head.dtype:
            return True
        with open_tensors(embedding.path) as one, open_tensors(head.path) as other:
            rows, others = one.get_slice(keys[0]), other.get_slice(keys[1])
            pieces = range(0, embedding.shape[0], _COMPARED_ROWS)
            pairs = ((rows[i : i + _COMPARED_ROWS], others[i : i + _COMPARED_ROWS]) for i in pieces)
            return not all(torch.equal(*pair) for pair in pairs)


def checkpoint_config(folder: Path) -> ModelConfig:
    """A model folder's config, as its weights are.

    A head of its own counts even where config.json says that it is the embedding's, as in
    transformers. Errors as of `load_config` and `stored_tensors`.
    """
    config = load_config(folder)
    if config.tie_word_embeddings and Checkpoint(folder, config).has_own_head():
        return replace(config, tie_word_embeddings=False)
    return config


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
