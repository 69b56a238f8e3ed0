"""Random weights, generated at the speed of memory, to measure models without their checkpoints.

Values are small and deterministic, so that activations stay in range; answers are nonsense.
Quantized weights are made up as such, of random codes: quantizing would take minutes.
"""

from __future__ import annotations

from math import log2
from zlib import crc32

import torch
from torch import Tensor

from flexgen_ray.kernels.dequantize import tensors_of
from flexgen_ray.quant.formats import WeightFormat
from flexgen_ray.quant.frame import Format, Shape
from flexgen_ray.quant.mxfp4 import MAGNITUDES
from flexgen_ray.quant.packing import PackedRows, code_bytes, num_groups

# Number of distinct random values. A prime, so that rows of a table differ though values repeat.
BLOCK = 2_097_143


class DummyWeights:
    """A source of weights: the same random numbers, repeated from another start in every tensor."""

    num_readers = 2  # one tensor is written to disk while another is filled

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._normal = torch.randn(BLOCK, generator=generator)
        self._codes = torch.randint(256, (BLOCK,), generator=generator, dtype=torch.uint8).repeat(2)
        self._scaled: dict[tuple[int, torch.dtype], Tensor] = {}
        self._packed: dict[tuple[int, str], tuple[Format, Shape]] = {}

    def check(
        self, layer: int, tensors: dict[str, tuple[int, ...]], weight_format: WeightFormat
    ) -> None:
        """Accept any shapes, and note which are quantized."""
        for name, shape in tensors.items():
            if form := weight_format.format_of(name, shape):
                self._packed[layer, name] = form, shape

    def is_packed(self, layer: int, name: str) -> bool:
        """True for weights that are quantized in the stage: they are in this source, too."""
        return (layer, name) in self._packed

    def read_into(self, layer: int, name: str, destination: Tensor, first: int = 0) -> None:
        """Fill a weight: norms with one, biases with zero, matrices [out, in] with N(0, 1 / in).

        Sinks are zero, too. Quantized ones get numbers of the same variance, spread evenly around
        zero. Experts' stacked matrices begin with that of expert `first`.
        """
        if name.endswith(".bias"):
            destination.zero_()
            return
        _, shape = self._packed.get((layer, name), (None, destination.shape))
        if len(shape) == 3:
            for number, matrix in enumerate(destination, start=first):
                self._fill_matrix(layer, name, matrix, number)
        elif len(shape) == 1:
            destination.fill_(float(name.endswith(".weight")))
        else:
            self._fill_matrix(layer, name, destination)

    def _fill_matrix(self, layer: int, name: str, destination: Tensor, expert: int = 0) -> None:
        start = (crc32(f"{layer}.{name}".encode()) + 7919 * expert) % BLOCK
        if self.is_packed(layer, name):
            self._repeat(self._codes[start : start + BLOCK], destination)
            form, shape = self._packed[layer, name]
            _fill_scales(form, shape[-2:], destination)
            return
        block = self._block(destination.shape[-1], destination.dtype)[start : start + BLOCK]
        self._repeat(block, destination)

    def _repeat(self, block: Tensor, destination: Tensor) -> None:
        """Fill a tensor with a block again and again."""
        # For a weight on another device, copy the numbers there once and repeat them there.
        block = block.to(destination.device)
        flat = destination.view(-1)
        whole = flat.numel() // BLOCK * BLOCK
        flat[:whole].view(-1, BLOCK).copy_(block)
        flat[whole:].copy_(block[: flat.numel() - whole])

    def _block(self, fan_in: int, dtype: torch.dtype) -> Tensor:
        """Return the scaled numbers twice in a row, so that BLOCK of them can begin anywhere."""
        key = fan_in, dtype
        if key not in self._scaled:
            scaled = (self._normal * fan_in**-0.5).to(dtype)
            self._scaled[key] = torch.cat([scaled, scaled])
        return self._scaled[key]


def _fill_scales(form: Format, shape: Shape, stored: Tensor) -> None:
    """Set the scales of a stored matrix of random codes, so that its values vary by 1 / columns.

    shape: (rows, columns) of the values.
    """
    size = shape[-1]
    if isinstance(form, PackedRows):
        stored[..., code_bytes(size, form.bits) :] = _parameters(size, form.bits)
        return
    mean_square = sum(it * it for it in MAGNITUDES) / len(MAGNITUDES)
    exponent = round(log2((size * mean_square) ** -0.5))
    tensors_of(stored, form, shape)["_scales"].fill_(127 + exponent)


def _parameters(size: int, bits: int) -> Tensor:
    """Bytes of the minimums and scales of a vector of so many values, all groups alike.

    Codes from 0 to n - 1, each as likely as any other, have the variance (n * n - 1) / 12; the
    values get 1 / size, and the mean zero.
    """
    count = 2**bits
    scale = (12 / (count**2 - 1) / size) ** 0.5
    pair = torch.tensor([-scale * (count - 1) / 2, scale], dtype=torch.float16)
    return pair.view(torch.uint8).repeat(num_groups(size))
