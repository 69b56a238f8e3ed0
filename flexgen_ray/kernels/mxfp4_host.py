"""MXFP4 on the CPU, near the speed of its memory; bit for bit as mxfp4.dequantize_plain.

Knows addresses of groups; no tiers.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from llvmlite import ir
from numba.core import types
from torch import Tensor

from flexgen_ray.kernels.threads import on_threads
from flexgen_ray.kernels.vectors import (
    F32,
    I8,
    I16,
    I32,
    KINDS,
    compiled,
    constant,
    emitted,
    load_raw,
    narrow,
    shuffle,
    splat,
    store,
    vector_of,
)
from flexgen_ray.quant.mxfp4 import GROUP, GROUP_BYTES

# Least work of a thread: far more than it costs to start one.
_GROUPS_PER_THREAD = 1 << 15


def dequantize(blocks: Tensor, scales: Tensor, out: Tensor) -> None:
    """Dequantize groups; shapes as for mxfp4.dequantize_plain, each matrix dense."""
    kind = KINDS[str(out.dtype).removeprefix("torch.")]
    addresses = np.array([[x.data_ptr() for x in each] for each in (blocks, scales, out)])
    count = scales.numel()
    work = partial(_dequantize, kind, addresses, scales.shape[1], out.element_size())
    on_threads(work, count, count // _GROUPS_PER_THREAD)


@compiled
def _dequantize(kind, addresses, groups, nbytes, first, end):
    """Dequantize groups from first to before end, counted over all matrices.

    addresses: int64 [3, matrices], of each one's blocks, scales and values; groups: those of a
    matrix; nbytes: bytes of a value.
    """
    for number in range(first, end):
        matrix, group = number // groups, number % groups
        _dequantize_group(
            kind,
            addresses[0, matrix] + group * GROUP_BYTES,
            addresses[1, matrix] + group,
            addresses[2, matrix] + group * GROUP * nbytes,
        )


@emitted
def _dequantize_group(context, kind, codes, scale, out):
    """Write the 32 values of a group; codes, scale, out: addresses."""

    def generate(context, b, signature, args):
        _, codes, scale, out = args
        values = b.bitcast(_bits(b, load_raw(b, I8, codes, GROUP_BYTES)), vector_of(F32, GROUP))
        exponent = b.zext(b.extract_element(load_raw(b, I8, scale, 1), I32(0)), I32)
        is_normal = b.icmp_unsigned(">", exponent, I32(1))
        normal = b.shl(b.sub(exponent, I32(1)), I32(23))
        power = b.select(is_normal, normal, b.shl(I32(1 << 21), exponent))
        scaled = b.fmul(values, splat(b, b.bitcast(power, F32), GROUP))
        store(b, _stored(b, kind, scaled), out)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3), generate


def _stored(b: ir.IRBuilder, kind: types.Type, values: ir.Value) -> ir.Value:
    """Float32 values as they are stored; bfloat16 holds them exactly."""
    if kind != types.int16:
        return narrow(b, kind, values)
    bits = b.lshr(b.bitcast(values, vector_of(I32, GROUP)), constant(16, I32, GROUP))
    return b.trunc(bits, vector_of(I16, GROUP))


def _bits(b: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    """Bits of twice the values of a group's bytes, two in each, in float32, before they are scaled.

    A magnitude above 0.5 has two bits of exponent and one of mantissa, as float32 has more.
    """
    low = b.and_(pairs, constant(15, I8, GROUP_BYTES))
    high = b.lshr(pairs, constant(4, I8, GROUP_BYTES))
    order = [place for i in range(GROUP_BYTES) for place in (i, GROUP_BYTES + i)]
    codes = b.zext(shuffle(b, low, high, order), vector_of(I32, GROUP))

    def number(value: int) -> ir.Constant:
        return constant(value, I32, GROUP)

    magnitude = b.and_(codes, number(7))
    normal = b.add(b.shl(magnitude, number(22)), number(127 << 23))
    is_normal = b.icmp_unsigned(">", magnitude, number(1))
    bits = b.select(is_normal, normal, b.mul(magnitude, number(127 << 23)))
    return b.or_(bits, b.shl(b.and_(codes, number(8)), number(28)))
