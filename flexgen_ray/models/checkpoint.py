"""Reads a Hugging Face checkpoint tensor by tensor. Safetensors only; pickle is refused.

Each read maps the file, copies one tensor and unmaps it, so memory peaks at one tensor.

A weight has three names or places, and this file leads from the first to the last:

    "o_proj.weight" of decoder layer 3             this project's name (ModelConfig.tensors)
    "model.layers.2.self_attn.o_proj.weight"       the checkpoint's name, by the family's
                                                   WEIGHT_NAMES
    model-00001-of-00004.safetensors               the file that holds it (tensor_files.py)

Some weights consist of several tensors, one above the other, as "qkv_proj.weight" of "q_proj",
"k_proj" and "v_proj" (`parts`); each is read directly into its rows. Phi-3 has them in one tensor,
as this project does. Experts have a tensor each and are stacked here; some checkpoints have them
stacked, too, and gpt-oss in another order (`Part.arranged`). In a quantized checkpoint
(quantized_checkpoint.py) matrices are uint8, in the form in which stores keep them; experts that
their publisher quantized are read by packed_experts.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.config_files import load_config
from flexgen_ray.models.packed_experts import BYTES, PackedExperts
from flexgen_ray.models.registry import FAMILIES, checkpoint_names, stacked_name, takes_turns
from flexgen_ray.models.tensor_files import open_tensors, stored_tensors
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.frame import Format

_DTYPES = ("F64", "F32", "F16", "BF16", BYTES)
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint that is a weight, or some of its rows.

    key: its name in the checkpoint. shape: shape that its values have as a weight. rows: rows of
    the weight that it fills; more than its own if it is repeated, as the norm of a head is for
    every head. expert: place of its expert in a stacked weight; None if it has none. experts: the
    experts that are read of a tensor that is stacked in the checkpoint; None for all. transposed:
    its matrices are [in, out] there. takes_turns: gate and up projection alternate in its outputs.
    """

    key: str
    shape: tuple[int, ...]
    rows: slice
    expert: int | None = None
    experts: slice | None = None
    transposed: bool = False
    takes_turns: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint, unless it is quantized."""
        if not self.transposed:
            return self.shape
        *others, rows, columns = self.shape
        return (*others, columns, rows)

    def as_stored(self) -> Part:
        """Return this part for the tensor as it is in the checkpoint."""
        return replace(self, shape=self.stored_shape, transposed=False, takes_turns=False)

    def arranged(self, values: Tensor) -> Tensor:
        """View of values [experts, ...] of the tensor, in the order of the weight's."""
        if self.takes_turns:
            values = values.unflatten(-1, (-1, 2)).movedim(-1, 1)
        return values.transpose(-1, -2) if self.transposed else values

    def of(self, weight: Tensor) -> Tensor:
        """Return the rows of a weight that this tensor fills."""
        return (weight if self.expert is None else weight[self.expert])[self.rows]


class Checkpoint:
    """The tensors of a model folder, by layer and this project's names."""

    num_readers = 1  # one copy from a mapped file uses all cores already

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder = Path(folder)
        self._config = config
        self._names = FAMILIES[config.family].WEIGHT_NAMES
        self._tensors = stored_tensors(self.folder)
        self._packed_experts = PackedExperts(self.folder, config, self._tensors)

    def check(
        self, layer: int, tensors: dict[str, tuple[int, ...]], weight_format: WeightFormat
    ) -> None:
        """Check a layer's tensors against the shapes that they should have.

        weight_format: the quantization with which stores keep weights.
        Raises ValueError if a tensor is missing, has another shape or an unsupported dtype, or is
        quantized already but to other bits than weight_format's.
        """
        for name, shape in tensors.items():
            if self._packed_experts.holds(name):
                self._packed_experts.check(layer, name)
                continue
            form, is_packed = weight_format.format_of(name, shape), self.is_packed(layer, name)
            for part in self.parts(layer, name, shape):
                self._check_part(part, form)
                if (self._tensors[part.key].dtype == BYTES) is not is_packed:
                    raise ValueError(
                        f"{self.folder}: of the tensors {', '.join(self._keys(layer, name))} some "
                        "are quantized, and some are not; download the checkpoint again"
                    )

    def _check_part(self, part: Part, form: Format | None) -> None:
        """Check the dtype and the shape of a tensor; form: the one in which it may be quantized."""
        stored, shape = self._tensors[part.key], part.shape
        if stored.dtype not in _DTYPES:
            raise ValueError(
                f"{stored.path}: {part.key} is stored as {stored.dtype}, which is not supported; "
                "take the checkpoint in bfloat16, float16 or float32"
            )
        if stored.dtype == BYTES:
            if form is None or stored.shape != form.stored_shape(shape):
                raise ValueError(
                    f"{self.folder}: {part.key} is quantized to other bits than asked for "
                    f"({form.name if form else 'none'}); leave the bits to the checkpoint, or take "
                    "the original one"
                )
        elif stored.shape != part.stored_shape:
            raise ValueError(
                f"{self.folder}: {part.key} has shape {list(stored.shape)}, but config.json makes "
                f"it {list(part.stored_shape)}"
            )

    def is_packed(self, layer: int, name: str) -> bool:
        """True if the checkpoint holds this weight quantized."""
        if self._packed_experts.holds(name):
            return True
        return self._tensors[self._keys(layer, name)[0]].dtype == BYTES

    def read_into(self, layer: int, name: str, destination: Tensor, first: int = 0) -> None:
        """Copy one weight into the destination, converting it to the destination's dtype.

        first: number of the first expert, if the destination has some experts of a stacked weight.
        Raises ValueError if a value is NaN, infinite, or beyond the range of that dtype.
        """
        if self._packed_experts.holds(name):
            self._packed_experts.read_into(layer, name, destination, first)
            return
        parts = self.parts(layer, name, tuple(destination.shape), first)
        # Opening a file reads the names of all its tensors.
        for path, some in groupby(parts, lambda part: self._tensors[part.key].path):
            with open_tensors(path) as file:
                for part in some:
                    _copy(file, path, part, part.of(destination))

    def read_part(self, part: Part, destination: Tensor) -> None:
        """Copy a tensor into the rows of a weight, more than once if they are more."""
        path = self._tensors[part.key].path
        with open_tensors(path) as file:
            _copy(file, path, part, destination)

    def parts(self, layer: int, name: str, shape: tuple[int, ...], first: int = 0) -> list[Part]:
        """Return the tensors of which a weight of this shape consists, in the order of its rows.

        first: number of the first expert, for some experts of a stacked weight.
        Raises ValueError if the checkpoint lacks one.
        """
        if len(shape) == 3:
            return self._expert_parts(layer, name, shape, first)
        return self._parts(self._keys(layer, name), name, shape)

    def _expert_parts(
        self, layer: int, name: str, shape: tuple[int, ...], first: int
    ) -> list[Part]:
        """Return the tensors of some experts, or the one in which the checkpoint stacks all."""
        count, *rest = shape
        if (key := stacked_name(layer, name)) in self._tensors:
            is_bias, experts = name.endswith(".bias"), slice(first, first + count)
            # Quantized tensors are in this project's order.
            differs = takes_turns(self._config.family) and self._tensors[key].dtype != BYTES
            whole = (self._config.num_experts, *(rest[1:] if is_bias else rest))
            turns = differs and name.startswith("gate_up")
            return [Part(key, whole, slice(None), None, experts, differs and not is_bias, turns)]
        return [
            replace(part, expert=number)
            for number in range(count)
            for part in self._parts(self._keys(layer, name, first + number), name, tuple(rest))
        ]

    def _parts(self, keys: list[str], name: str, shape: tuple[int, ...]) -> list[Part]:
        module = name.rpartition(".")[0]
        counts = self._config.stacked(module) if len(keys) > 1 else shape[:1]
        is_repeated = module == "qk_norm" and self._config.qk_norm == "heads"
        parts, start = [], 0
        for key, count in zip(keys, counts, strict=True):
            own = self._config.head_dim if is_repeated else count
            parts.append(Part(key, (own, *shape[1:]), slice(start, start + count)))
            start += count
        return parts

    def _keys(self, layer: int, name: str, expert: int = 0) -> list[str]:
        """Return the names in the checkpoint of the tensors of which a weight consists.

        expert: number of the one to which a stacked weight's tensors belong.
        Raises ValueError if the checkpoint lacks one.
        """
        stacked = stacked_name(layer, name)
        if stacked in self._tensors:
            return [stacked]
        keys = checkpoint_names(self._config.family, layer, name, expert)
        return [self._find(key, name) for key in keys]

    def _find(self, key: str, name: str) -> str:
        """Return the name under which a tensor is in the checkpoint."""
        keys = [key]
        if self._config.tie_word_embeddings and name == "embed_tokens.weight":
            # A tied model may be saved with its matrix under the head's name alone.
            keys.append(f"{self._names['lm_head']}.weight")
        # Mixtral's router, where experts are stacked.
        keys.append(key.replace(".block_sparse_moe.", ".mlp."))
        for candidate in keys:
            # Checkpoints of the bare model, as OPT was first published, lack the prefix.
            for name_there in (candidate, candidate.removeprefix("model.")):
                if name_there in self._tensors:
                    return name_there
        raise ValueError(f"{self.folder}: no safetensors file holds the tensor {key}")

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


def _copy(file: Any, path: Path, part: Part, destination: Tensor) -> None:
    """Copy a tensor of an open file into the rows of a weight."""
    whole = part.experts is None
    values = file.get_tensor(part.key) if whole else file.get_slice(part.key)[part.experts]
    arranged = part.arranged(values)
    destination.view(-1, *arranged.shape).copy_(arranged)
    if destination.is_floating_point() and not _is_finite(values, destination):
        raise ValueError(f"{path}: {part.key} {_fault(values, destination)}")


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
