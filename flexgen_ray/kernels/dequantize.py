"""Values of quantized weights, of whichever format they are (quant/frame.py).

Each format has a function here, which chooses the fastest code for a tensor's device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flexgen_ray.kernels.pack import unpack
from flexgen_ray.quant.frame import Format
from flexgen_ray.quant.packing import PackedRows


def dequantize(stored: Tensor, form: Format, out: Tensor) -> None:
    """Dequantize matrices into out, rounded to its dtype.

    stored: uint8, of form.stored_shape of out's shape; out: float32, float16 or bfloat16 [...,
    rows, columns], on the same device. Raises ValueError if the two don't fit together.
    """
    _DEQUANTIZERS[type(form)](stored, form, out)


def _packed_rows(stored: Tensor, form: PackedRows, out: Tensor) -> None:
    unpack(stored, form.bits, out)


_DEQUANTIZERS: dict[type[Format], Callable[[Tensor, Any, Tensor], None]] = {
    PackedRows: _packed_rows
}
