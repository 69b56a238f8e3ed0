"""Quantization of vectors of floats to packed vectors (quant/packing.py has the layout), and back.

A value is minimum + code * scale in float32, where the product is exact, so every device gives
the same bits. Chooses the fastest code for a tensor's device: pack_host, pack_cuda or pack_plain.
Knows numbers only: no tiers, no models.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from flexgen_ray.quant.packing import LARGEST, packed_bytes

_log = logging.getLogger(__name__)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack(
    x: Tensor,
    bits: int,
    out: Tensor | None = None,
    least_squares: bool = False,
    raises: bool = True,
) -> Tensor:
    """Quantize each vector of x, its last dimension, to the nearest codes.

    x: [..., size], of any float dtype, rounded to float32; bits: 4 or 8.
    out, returned: uint8 [..., packed_bytes(size, bits)], dense in its last dimension; None to
    allocate it.
    least_squares: search each group's minimum and scale for a smaller squared error, at many times
    the cost; groups of fewer than 64 values are not searched. Otherwise the minimum is rounded to
    float16, and the scale up to the next float16 that reaches the largest value.
    raises: raise ValueError for a value that is not finite or beyond LARGEST. Without it, and on
    CUDA, where checking would wait for the device, such a value's group becomes NaN.
    Raises ValueError for least_squares on CUDA.
    """
    shape = (*x.shape[:-1], packed_bytes(x.shape[-1], bits))
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=x.device)
    _check(out, shape, x.device)
    values = x if x.dtype in _DTYPES else x.float()
    values = values if _is_dense(values) else values.contiguous()
    if x.device.type != "cpu":
        if least_squares:
            raise ValueError(
                f"least squares are searched on the CPU, not on {x.device}: pack there"
            )
        _on_device(x.device).pack(values, bits, out)
        return out
    from flexgen_ray.kernels import pack_host as host

    if not host.pack(values, bits, out, least_squares) and raises:
        raise ValueError(
            f"values from {x.min():g} to {x.max():g} can't be quantized: beyond {LARGEST:g} their"
            " scale leaves float16; check the weights, or leave them unquantized"
        )
    return out


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """Dequantize packed vectors into out, rounded to its dtype.

    packed: uint8 [..., packed_bytes(size, bits)]; out: float32, float16 or bfloat16 [..., size],
    on the same device; both dense in their last dimension.
    Raises ValueError if the two don't fit together.
    """
    _check(packed, (*out.shape[:-1], packed_bytes(out.shape[-1], bits)), out.device)
    if out.dtype not in _DTYPES:
        raise ValueError(
            f"quantized values are dequantized to one of {_DTYPES}, not to {out.dtype}"
        )
    if not _is_dense(out):
        raise ValueError(f"out must be dense in its last dimension, not strided {out.stride()}")
    if out.device.type != "cpu":
        _on_device(out.device).unpack(packed, bits, out)
        return
    from flexgen_ray.kernels import pack_host as host

    host.unpack(packed, bits, out)


@cache
def _on_device(device: torch.device) -> ModuleType:
    """Module that packs on a device other than the CPU."""
    name = "pack_cuda" if can_use_triton(device) else "pack_plain"
    return import_module(f"flexgen_ray.kernels.{name}")


@cache
def can_use_triton(device: torch.device) -> bool:
    """True if Triton is there and can compile.

    Triton comes with most of torch's CUDA packages, and needs a C compiler when it runs.
    """
    if not find_spec("triton"):
        return False
    fast = import_module("flexgen_ray.kernels.pack_cuda")
    try:
        pack_into = torch.empty(1, packed_bytes(1, 8), dtype=torch.uint8, device=device)
        fast.pack(torch.zeros(1, 1, device=device), 8, pack_into)
    except Exception as error:
        _log.warning(
            "Triton can't compile here (%s): quantized values use torch's own kernels, which are "
            "slower and need more memory; install a C compiler and Python's headers (gcc, "
            "python3-dev)",
            error,
        )
        return False
    return True


def _check(packed: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError unless packed is uint8 of this shape, on this device, and dense."""
    own = packed.dtype, tuple(packed.shape), packed.device
    if own != (torch.uint8, shape, device) or not _is_dense(packed):
        raise ValueError(
            f"packed vectors must be torch.uint8 {list(shape)} on {device}, dense in their last"
            f" dimension, not {own[0]} {list(own[1])} on {own[2]}, strided {packed.stride()}"
        )


def _is_dense(x: Tensor) -> bool:
    """True if a vector's values lie side by side."""
    return x.shape[-1] == 1 or x.stride(-1) == 1
