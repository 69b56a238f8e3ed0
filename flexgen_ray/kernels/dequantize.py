"""Tensors and values of quantized weights, of whichever format they are (quant/frame.py).

Each format has a function here, which chooses the fastest code for a tensor's device.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch import Tensor

from flexgen_ray.kernels import mxfp4
from flexgen_ray.kernels.pack import unpack
from flexgen_ray.quant.frame import Format, Shape
from flexgen_ray.quant.mxfp4 import Mxfp4
from flexgen_ray.quant.packing import PackedRows


def tensors_of(stored: Tensor, form: Format, shape: Shape) -> dict[str, Tensor]:
    """{end of its name in a checkpoint: view of one of the tensors that a stored weight has}.

    stored: uint8, of form.stored_shape(shape); shape: [..., rows, columns] of the values.
    Raises ValueError if the two don't fit together.
    """
    if stored.shape != form.stored_shape(shape):
        raise ValueError(
            f"{list(shape)} values in {form.name} take bytes of the shape "
            f"{list(form.stored_shape(shape))}, not {list(stored.shape)}"
        )
    tensors, outer, start = form.tensors(shape), len(shape) - 2, 0
    if len(tensors) == 1:
        return dict.fromkeys(tensors, stored)
    views = {}
    for suffix, sizes in tensors.items():
        end = start + prod(sizes[outer:])
        views[suffix], start = stored[..., start:end].unflatten(-1, sizes[outer:]), end
    return views


def dequantize(stored: Tensor, form: Format, out: Tensor) -> None:
    """Dequantize matrices into out, rounded to its dtype.

    stored: uint8, of form.stored_shape of out's shape; out: float32, float16 or bfloat16 [...,
    rows, columns], on the same device. Raises ValueError if the two don't fit together.
    """
    _DEQUANTIZERS[type(form)](stored, form, out)


def all_finite(stored: Tensor, form: Format, shape: Shape) -> bool:
    """True if all values of matrices are finite in float32; shapes as for tensors_of."""
    tensors = tensors_of(stored, form, shape)
    return _FINITE[type(form)](*tensors.values()) if type(form) in _FINITE else True


def _packed_rows(stored: Tensor, form: PackedRows, out: Tensor) -> None:
    unpack(stored, form.bits, out)


def _mxfp4(stored: Tensor, form: Mxfp4, out: Tensor) -> None:
    blocks, scales = tensors_of(stored, form, tuple(out.shape)).values()
    mxfp4.dequantize(blocks, scales, out)


_DEQUANTIZERS: dict[type[Format], Callable[[Tensor, Any, Tensor], None]] = {
    PackedRows: _packed_rows,
    Mxfp4: _mxfp4,
}
# Formats whose values may overflow; ours are checked when they are made.
_FINITE: dict[type[Format], Callable[..., bool]] = {Mxfp4: mxfp4.all_finite}
