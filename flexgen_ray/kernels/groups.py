"""LLVM code that quantizes and dequantizes one group of a packed vector, within numba functions.

Nothing is reordered or fused that would change a bit, so every CPU gives the same result. Knows a
group's codes, minimum and scale (quant/packing.py has the layout); no vectors of several groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from flexgen_ray.kernels.vectors import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    ROUNDER,
    constant,
    emitted,
    load,
    load_raw,
    narrow,
    shuffle,
    splat,
    store,
    vector_of,
)
from flexgen_ray.quant.packing import GROUP

# Bytes of codes that are converted at a time: the compiler splits them as its CPU demands.
RUN = GROUP // 2
HALF_MAX = 65504.0  # the largest float16


def _make_dequantizer(count: int) -> Any:
    @emitted
    def dequantize(context, kind, codes, shift, mask, parameters, out):
        """Write count values from as many bytes: minimum + (byte >> shift & mask) * scale.

        codes, out: addresses; parameters: address of minimum and scale, two float16.
        """

        def generate(context, b, signature, args):
            _, codes, shift, mask, parameters, out = args
            bits = b.lshr(load_raw(b, I8, codes, count), splat(b, shift, count))
            code = b.uitofp(b.and_(bits, splat(b, mask, count)), vector_of(F32, count))
            numbers = load(b, types.uint16, parameters, 2)
            minimum, scale = (splat(b, b.extract_element(numbers, I32(i)), count) for i in (0, 1))
            store(b, narrow(b, kind, b.fadd(minimum, b.fmul(code, scale))), out)
            return context.get_dummy_value()

        address, byte = types.int64, types.uint8
        return types.void(kind, address, byte, byte, address, address), generate

    return dequantize


dequantize_run, dequantize_one = _make_dequantizer(RUN), _make_dequantizer(1)


def _make_quantizer(count: int) -> Any:
    @emitted
    def quantize(context, kind, values, others, grid, out):
        """Write count bytes: codes of as many values, and of others in the high nibbles.

        values, others, out: addresses; others may be 0, for none.
        grid: (minimum, scale or 1, highest code).
        """

        def generate(context, b, signature, args):
            _, values, others, grid, out = args
            codes = _codes(b, load(b, kind, values, count), grid)
            store(b, codes, out)
            with b.if_then(b.icmp_signed("!=", others, I64(0))):
                high = _codes(b, load(b, kind, others, count), grid)
                store(b, b.or_(codes, b.shl(high, constant(4, I8, count))), out)
            return context.get_dummy_value()

        address, grids = types.int64, types.UniTuple(types.float32, 3)
        return types.void(kind, address, address, grids, address), generate

    return quantize


quantize_run, quantize_one = _make_quantizer(RUN), _make_quantizer(1)


def _codes(b: ir.IRBuilder, values: ir.Value, grid: ir.Value) -> ir.Value:
    """Vector of uint8 codes of float32 values; grid: (minimum, scale or 1, highest code)."""
    count = values.type.count
    minimum, scale, highest = (splat(b, b.extract_value(grid, i), count) for i in range(3))
    steps = round_to_codes(b, b.fdiv(b.fsub(values, minimum), scale), highest)
    return b.trunc(b.bitcast(steps, vector_of(I32, count)), vector_of(I8, count))


def round_to_codes(b: ir.IRBuilder, steps: ir.Value, highest: ir.Value) -> ir.Value:
    """ROUNDER + the nearest code to each number of steps, from 0 to the highest.

    The sum's low bits are the code too, so no conversion to an integer is needed.
    """
    count = steps.type.count
    steps = b.select(b.fcmp_ordered(">", steps, highest), highest, steps)
    zeros = constant(0.0, count=count)
    steps = b.select(b.fcmp_ordered("<", steps, zeros), zeros, steps)
    return b.fadd(steps, constant(ROUNDER, count=count))


def round_to_half(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Float32 values rounded to float16 and added to zero, which makes 0.0 of -0.0."""
    count = x.type.count
    halves = b.fptrunc(x, vector_of(F16, count))
    return b.fadd(b.fpext(halves, vector_of(F32, count)), constant(0.0, count=count))


@emitted
def extremes(context, kind, values):
    """(least, largest) of the whole group at an address; NaN if one of them isn't finite."""

    def generate(context, b, signature, args):
        x = load(b, kind, args[1], GROUP)
        low = _fold(b, x, lambda x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
        high = _fold(b, x, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
        zero_or_nan = _fold(b, b.fmul(x, constant(0.0, count=GROUP)), b.fadd)
        ends = [b.fadd(zero_or_nan, end) for end in (low, high)]
        return context.make_tuple(b, signature.return_type, ends)

    return types.UniTuple(types.float32, 2)(kind, types.int64), generate


def _fold(b: ir.IRBuilder, values: ir.Value, combine: Callable) -> ir.Value:
    """One value of a vector's, combined half by half, so that every CPU takes the same order."""
    while (count := values.type.count // 2) > 0:
        low, high = (
            shuffle(b, values, values, lanes) for lanes in (range(count), range(count, 2 * count))
        )
        values = combine(low, high)
    return b.extract_element(values, I32(0))


@emitted
def value_at(context, kind, address):
    """One stored value as float32."""

    def generate(context, b, signature, args):
        return b.extract_element(load(b, kind, args[1], 1), I32(0))

    return types.float32(kind, types.int64), generate


@emitted
def to_half(context, value):
    """Bits of the float16 nearest to a float32."""

    def generate(context, b, signature, args):
        return b.bitcast(b.fptrunc(args[0], F16), I16)

    return types.uint16(types.float32), generate


@emitted
def from_half(context, bits):
    """Float32 with the value of a float16's bits."""

    def generate(context, b, signature, args):
        return b.fpext(b.bitcast(args[0], F16), F32)

    return types.float32(types.uint16), generate


@emitted
def store_halves(context, first, second, address):
    """Write the bits of two float16, one after the other."""

    def generate(context, b, signature, args):
        store(b, args[0], args[2])
        store(b, args[1], b.add(args[2], I64(2)))
        return context.get_dummy_value()

    return types.void(types.uint16, types.uint16, types.int64), generate
