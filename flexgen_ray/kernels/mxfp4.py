"""Values of MXFP4 (quant/mxfp4.py has the layout), bit for bit the same on every device.

A value is computed as its doubled, signed magnitude times half its group's power of two. float32
holds both factors and their product exactly, unless the product overflows to infinity. bfloat16
holds it exactly, too; float16 rounds it.
Chooses the fastest code for a tensor's device: mxfp4_host, mxfp4_cuda or `dequantize_plain`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexgen_ray.kernels.pack import can_use_triton
from flexgen_ray.quant.mxfp4 import GROUP, MAGNITUDES

_SAFE_SCALE = 252  # the largest that leaves every magnitude finite
_DOUBLED = tuple(2 * sign * magnitude for sign in (1, -1) for magnitude in MAGNITUDES)


def dequantize(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Dequantize matrices into out, rounded to its dtype.

    blocks: uint8 [..., rows, groups, 16]; scales: uint8 [..., rows, groups]; each matrix of them
    is dense. out: float32, float16 or bfloat16 [..., rows, 32 * groups], dense.
    """
    rows, groups = scales.shape[-2:]
    parts = blocks.view(-1, rows * groups, 16), scales.view(-1, rows * groups)
    _dequantizer(out.device)(*parts, out.view(-1, rows * groups, 32))


def all_finite(blocks: Tensor, scales: Tensor) -> bool:
    """True if no value overflows float32; shapes as for `dequantize`."""
    large = scales > _SAFE_SCALE
    if not large.any():
        return True
    values = torch.empty(int(large.sum()), 1, GROUP, device=scales.device)
    dequantize_plain(blocks[large][:, None], scales[large][:, None], values)
    return bool(values.isfinite().all())


def _dequantizer(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None]:
    if device.type == "cpu":
        from flexgen_ray.kernels.mxfp4_host import dequantize
    elif can_use_triton(device):
        from flexgen_ray.kernels.mxfp4_cuda import dequantize
    else:
        return dequantize_plain
    return dequantize


def dequantize_plain(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Dequantize in plain torch, on any device: the reference that faster code equals.

    blocks: uint8 [matrices, groups, 16]; scales: uint8 [matrices, groups]; out: [matrices, groups,
    32]. Takes several passes over memory, and some bytes a value of one matrix at a time.
    """
    table = torch.tensor(_DOUBLED, device=out.device)
    for codes, exponents, values in zip(blocks, scales, out, strict=True):
        pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        # Bits of float32: powers below its least normal number are bits of its mantissa.
        exponents = exponents.int()
        bits = torch.where(exponents < 2, 1 << 21 << exponents.clamp(max=1), exponents - 1 << 23)
        values.copy_(table[pairs.int()].mul_(bits.view(torch.float32)[:, None]))
