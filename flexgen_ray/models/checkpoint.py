"""Reads a Hugging Face checkpoint tensor by tensor. Safetensors only; pickle is refused.

Each read maps the file, copies one tensor and unmaps it, so memory peaks at one tensor.

A weight has three names or places, and this file leads from the first to the last:

    "q_proj.weight" of decoder layer 3             this project's name (ModelConfig.tensors)
    "model.layers.2.self_attn.q_proj.weight"       the checkpoint's name, by the family's
    WEIGHT_NAMES model-00001-of-00004.safetensors               the file that holds it
    (tensor_files.py)

A family may store several weights in one tensor, as Phi-3 does with queries, keys and values
("qkv_proj"). Then several of this project's names have the same name in WEIGHT_NAMES, and each is a
range of that tensor's rows, in WEIGHT_NAMES' order. In a quantized checkpoint
(quantized_checkpoint.py) matrices are uint8, in the form in which stores keep them.
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

PACKED = "U8"  # safetensors' name of the dtype of quantized matrices
_DTYPES = ("F64", "F32", "F16", "BF16", PACKED)
_COMPARED_ROWS = 4096


class Checkpoint:
    """The tensors of a model folder, by layer and this project's names."""

    num_readers = 1  # one copy from a mapped file uses all cores already

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder = Path(folder)
        self._config = config
        self._names = FAMILIES[config.family].WEIGHT_NAMES
        self._tensors = stored_tensors(self.folder)

    def check(
        self, layer: int, tensors: dict[str, tuple[int, ...]], weight_format: WeightFormat
    ) -> None:
        """Check a layer's tensors against the shapes that they should have.

        weight_format: the quantization with which stores keep weights.
        Raises ValueError if a tensor is missing, has another shape or an unsupported dtype, or is
        quantized already but to other bits than weight_format's.
        """
        for name, shape in tensors.items():
            stored, (_, count) = self._stored(layer, name), self._rows(layer, name)
            # The stored tensor may have more rows than this weight, which shares it with others.
            stored_shape, whole = stored.shape, (count, *shape[1:])
            if stored.dtype not in _DTYPES:
                raise ValueError(
                    f"{stored.path}: {self.key(layer, name)} is stored as {stored.dtype}, which is "
                    "not supported; take the checkpoint in bfloat16, float16 or float32"
                )
            if self.is_packed(layer, name):
                bits = weight_format.bits_of(name, shape)
                if bits is None or stored_shape != (*whole[:-1], packed_bytes(shape[-1], bits)):
                    raise ValueError(
                        f"{self.folder}: {self.key(layer, name)} is quantized to other bits "
                        f"than {bits}; leave the bits to the checkpoint, or take the original one"
                    )
            elif stored_shape != whole:
                raise ValueError(
                    f"{self.folder}: {self.key(layer, name)} has shape {list(stored_shape)}, "
                    f"but config.json makes it {list(whole)}"
                )

    def is_packed(self, layer: int, name: str) -> bool:
        """True if the checkpoint holds this weight quantized."""
        return self._stored(layer, name).dtype == PACKED

    def read_into(self, layer: int, name: str, destination: Tensor) -> None:
        """Copy one weight into the destination, converting it to the destination's dtype.

        Raises ValueError if a value is NaN, infinite, or beyond the range of that dtype.
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
        """Return a weight's name in the checkpoint.

        Raises ValueError if the checkpoint lacks it.
        """
        module, _, kind = name.rpartition(".")
        key = f"{self._names[module].format(layer - 1)}.{kind}"
        keys = [key]
        if self._config.tie_word_embeddings and module == "embed_tokens":
            # A tied model may be saved with its matrix under the head's name alone.
            keys.append(f"{self._names['lm_head']}.{kind}")
        for candidate in keys:
            # Checkpoints of the bare model, as OPT was first published, lack the prefix.
            for name_there in (candidate, candidate.removeprefix("model.")):
                if name_there in self._tensors:
                    return name_there
        raise ValueError(f"{self.folder}: no safetensors file holds the tensor {key}")

    def _rows(self, layer: int, name: str) -> tuple[slice, int]:
        """Return the rows of a weight within its tensor in the checkpoint, and that tensor's rows.

        Example of Phi-3 with 32 query and 8 key heads of 64: "q_proj", "k_proj" and "v_proj" all
        are "qkv_proj", so k_proj's rows are slice(2048, 2560) of 3072. A weight with a tensor of
        its own has all rows of it.
        """
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
        """True if the checkpoint has a matrix for the head that differs from the embedding's."""
        names = [self._names[module] + ".weight" for module in ("embed_tokens", "lm_head")]
        keys = [name if name in self._tensors else name.removeprefix("model.") for name in names]
        if not all(key in self._tensors for key in keys):
            return False
        embedding, head = (self._tensors[key] for key in keys)
        if embedding.shape != head.shape or embedding.dtype != head.dtype:
            return True
        # Compare piece by piece, so memory stays small.
        with open_tensors(embedding.path) as one, open_tensors(head.path) as other:
            rows, others = one.get_slice(keys[0]), other.get_slice(keys[1])
            pieces = range(0, embedding.shape[0], _COMPARED_ROWS)
            pairs = ((rows[i : i + _COMPARED_ROWS], others[i : i + _COMPARED_ROWS]) for i in pieces)
            return not all(torch.equal(*pair) for pair in pairs)


def checkpoint_config(folder: Path) -> ModelConfig:
    """Load a model folder's config, and correct tie_word_embeddings by the weights.

    A checkpoint with a head of its own uses it even if config.json says that head and embedding are
    tied, as in transformers. Raises as `load_config` and `stored_tensors` do.
    """
    config = load_config(folder)
    if config.tie_word_embeddings and Checkpoint(folder, config).has_own_head():
        return replace(config, tie_word_embeddings=False)
    return config


def _is_finite(values: Tensor, copied: Tensor) -> bool:
    """Return whether all values of a copied tensor are finite.

    Takes one pass over the smaller of source and copy. Values that overflowed are infinite in the
    copy, so the source is enough only if the copy's dtype is wider.
    """
    widens = copied.dtype == torch.float32 and values.dtype in (torch.float16, torch.bfloat16)
    seen = values if widens and copied.device.type == "cpu" else copied
    # Minimum and maximum are NaN if any value is.
    return bool(torch.stack(torch.aminmax(seen)).isfinite().all())


def _fault(values: Tensor, copied: Tensor) -> str:
    """Describe the non-finite values of a tensor or of its copy in another dtype, with a remedy."""
    count, wrong = values.numel(), int(values.isfinite().logical_not().sum())
    if wrong:
        nans = int(values.isnan().sum())
        return (
            f"holds {nans} NaN and {wrong - nans} infinite values of {count}, which make every "
            "answer nonsense; download it again, or take another checkpoint"
        )
    wrong, dtype = int(copied.isfinite().logical_not().sum()), copied.dtype
    return (
        f"holds {wrong} values of {count} beyond {torch.finfo(dtype).max:g}, the largest of "
        f"{str(dtype).removeprefix('torch.')}; use --dtype bfloat16 or float32"
    )
