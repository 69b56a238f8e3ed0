"""Experts that a checkpoint has quantized in a format of its publisher's (quant/formats.FORMATS).

Their bytes are read as they are, in the order in which stores keep them: the tensors of a matrix
one after the other, and whole rows of the gate projection before those of the up projection.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from flexgen_ray.kernels.dequantize import all_finite, tensors_of
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.models.registry import stacked_name, takes_turns
from flexgen_ray.models.tensor_files import StoredTensor, open_tensors
from flexgen_ray.quant.formats import FORMATS
from flexgen_ray.quant.frame import Format

BYTES = "U8"  # safetensors' name of the dtype of quantized matrices


class PackedExperts:
    """The quantized experts of a model folder; it may have none.

    tensors: all tensors of the folder, by their names there.
    """

    def __init__(self, folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
        self._folder = folder
        self._config = config
        self._tensors = tensors
        form = config.expert_format
        self._form: Format | None = None if form is None else FORMATS[form]

    def holds(self, name: str) -> bool:
        """True for weights, such as "down_experts.weight", that are quantized experts."""
        is_weight = name.endswith(".weight") and stacked_name(1, name) is not None
        return self._form is not None and is_weight

    def check(self, layer: int, name: str) -> None:
        """Raise ValueError if a tensor of a weight is missing, or isn't of the format's bytes."""
        assert self._form is not None
        for suffix, shape in self._form.tensors(self._config.tensors(layer)[name]).items():
            key = f"{stacked_name(layer, name)}{suffix}"
            stored = self._tensors.get(key)
            if stored is None:
                raise ValueError(f"{self._folder}: no safetensors file holds the tensor {key}")
            if (stored.dtype, stored.shape) != (BYTES, shape):
                raise ValueError(
                    f"{stored.path}: {key} is {stored.dtype} {list(stored.shape)}, but "
                    f"config.json says {self._form.name}, which makes it {BYTES} {list(shape)}"
                )

    def read_into(self, layer: int, name: str, destination: Tensor, first: int) -> None:
        """Copy some experts' bytes of a weight.

        destination: uint8, as stores keep them; first: number of the first expert.
        Raises ValueError if a value is infinite or NaN.
        """
        assert self._form is not None
        shape = len(destination), *self._config.tensors(layer)[name][1:]
        alternates = takes_turns(self._config.family) and name.startswith("gate_up")
        experts = slice(first, first + len(destination))
        # Another device would take memory for what is put in order on the way.
        is_host = destination.device.type == "cpu"
        stored = destination if is_host else torch.empty(destination.shape, dtype=torch.uint8)
        keys = {
            f"{stacked_name(layer, name)}{suffix}": view
            for suffix, view in tensors_of(stored, self._form, shape).items()
        }
        for path, some in groupby(keys, lambda key: self._tensors[key].path):
            with open_tensors(path) as file:
                for key in some:
                    values, view = file.get_slice(key)[experts], keys[key]
                    if alternates:
                        values = values.unflatten(1, (-1, 2)).transpose(1, 2)
                        view = view.unflatten(1, (2, -1))
                    view.copy_(values)
        if not all_finite(stored, self._form, shape):
            raise ValueError(
                f"{self._folder}: experts {first} to {experts.stop - 1} of "
                f"{stacked_name(layer, name)} hold values beyond float32, which make every answer "
                "nonsense; download it again, or take another checkpoint"
            )
        if not is_host:
            destination.copy_(stored)
