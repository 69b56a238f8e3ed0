"""MXFP4 on CUDA in one pass over memory; bit for bit as mxfp4.dequantize_plain.

Triton has no types of four bits, nor powers of two in a byte, on GPUs before Ada: values are made
of their bits. Each program takes some neighbouring groups of a matrix. Needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexgen_ray.kernels.pack_cuda import address_divisor

_GROUPS_PER_PROGRAM = 128
_VECTOR = 16  # bytes of the widest load and store


def dequantize(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Dequantize groups; shapes as for mxfp4.dequantize_plain, each matrix dense."""
    matrices, groups = scales.shape
    if not scales.numel():
        return
    is_aligned = not any(address_divisor(x[:, 0]) % _VECTOR for x in (blocks, out))
    strides = (x.stride(0) for x in (blocks, scales, out))
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(groups, _GROUPS_PER_PROGRAM), matrices)](
            blocks, scales, out, groups, *strides,
            ALIGNMENT=_VECTOR if is_aligned else 1, UNITS=_GROUPS_PER_PROGRAM,
        )  # fmt: skip


@triton.jit
def _value(code, power):
    """Float32 of twice the values of codes of four bits, times a power of two."""
    magnitude = code & 7
    # A magnitude above 0.5 has two bits of exponent and one of mantissa, as float32 has more.
    bits = tl.where(magnitude > 1, (magnitude << 22) + 0x3F800000, magnitude * 0x3F800000)
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True) * power


@triton.jit
def _dequantize(
    blocks, scales, out, groups, block_stride, scale_stride, out_stride,
    ALIGNMENT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Dequantize UNITS groups of a matrix; strides: elements from matrix to matrix."""
    matrix = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live = group < groups
    exponent = tl.load(scales + matrix * scale_stride + group, mask=live, other=0).to(tl.uint32)
    power = tl.where(exponent > 1, (exponent - 1) << 23, 0x200000 << exponent)
    power = power.to(tl.float32, bitcast=True)[:, None]
    i, place = tl.arange(0, 16)[None, :], group.to(tl.int64)
    codes = tl.multiple_of(blocks + matrix * block_stride + place * 16, ALIGNMENT)
    code = tl.load(codes[:, None] + i, mask=live[:, None], other=0).to(tl.uint32)
    values = tl.interleave(_value(code & 15, power), _value(code >> 4, power))
    target = tl.multiple_of(out + matrix * out_stride + place * 32, ALIGNMENT)
    i = tl.arange(0, 32)[None, :]
    if out.dtype.element_ty == tl.bfloat16:  # which holds the values exactly
        values = (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
        values = values.to(tl.bfloat16, bitcast=True)
    tl.store(target[:, None] + i, values.to(out.dtype.element_ty), mask=live[:, None])
