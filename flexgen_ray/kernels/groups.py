"""LLVM code that packs and unpacks groups with vectors: for use within numba functions.

A dummy scalar names the type values are stored in: float32, uint16 (IEEE half) or int16
(bfloat16), since numba has no 16-bit floats. Nothing is reordered or fused that would change a
bit, so every CPU gives the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flexgen_ray.quant.packing import GROUP

KINDS = {"float32": np.float32(0), "float16": np.uint16(0), "bfloat16": np.int16(0)}
# Bytes of codes that are unpacked at a time: the compiler splits them as its CPU demands.
RUN = GROUP // 2

F32, F16, I8, I16, I32 = ir.FloatType(), ir.HalfType(), *map(ir.IntType, (8, 16, 32))
# Added and subtracted, it rounds a float32 that is smaller to a whole number, ties to even.
ROUNDER = 1.5 * 2**23
HALF_MAX = 65504.0
# mypy takes the decorator's result for what numba's compiler sees.
emitted: Callable[[Callable], Any] = intrinsic


def vector(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)


def constant(element: ir.Type, value: float, count: int) -> ir.Constant:
    """A vector of count times the value."""
    return ir.Constant(vector(element, count), [value] * count)


def splat(b: ir.IRBuilder, x: ir.Value, count: int) -> ir.Value:
    """A vector of count times the scalar."""
    empty = ir.Constant(vector(x.type, count), ir.Undefined)
    first = b.insert_element(empty, x, I32(0))
    return b.shuffle_vector(first, first, constant(I32, 0, count))


def load(b: ir.IRBuilder, element: ir.Type, address: ir.Value, count: int) -> ir.Value:
    value = b.load(b.inttoptr(address, vector(element, count).as_pointer()))
    value.align = 1
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 1


def widen(b: ir.IRBuilder, kind: types.Type, address: ir.Value, count: int) -> ir.Value:
    """count stored values as float32."""
    if kind == types.float32:
        return load(b, F32, address, count)
    if kind == types.uint16:
        return b.fpext(load(b, F16, address, count), vector(F32, count))
    bits = b.zext(load(b, I16, address, count), vector(I32, count))
    return b.bitcast(b.shl(bits, constant(I32, 16, count)), vector(F32, count))


def narrow(b: ir.IRBuilder, kind: types.Type, value: ir.Value) -> ir.Value:
    """As it is stored: rounded to nearest, ties to even; what is not a number stays so."""
    count = value.type.count
    if kind == types.float32:
        return value
    if kind == types.uint16:
        return b.fptrunc(value, vector(F16, count))
    bits = b.bitcast(value, vector(I32, count))
    odd = b.and_(b.lshr(bits, constant(I32, 16, count)), constant(I32, 1, count))
    rounded = b.add(bits, b.add(odd, constant(I32, 0x7FFF, count)))
    nan = b.fcmp_unordered("uno", value, value)
    kept = b.select(nan, constant(I32, 0x7FC00000, count), rounded)
    return b.trunc(b.lshr(kept, constant(I32, 16, count)), vector(I16, count))


def _spread(count: int) -> Any:
    @emitted
    def spread(context, kind, codes, shift, mask, parameters, out):
        """count values from as many bytes: minimum + (byte >> shift & mask) * scale.

        parameters: the address of minimum and scale, two float16.
        """

        def generate(context, b, signature, args):
            _, codes, shift, mask, parameters, out = args
            bits = b.lshr(load(b, I8, codes, count), splat(b, shift, count))
            code = b.uitofp(b.and_(bits, splat(b, mask, count)), vector(F32, count))
            numbers = widen(b, types.uint16, parameters, 2)
            minimum, scale = (splat(b, b.extract_element(numbers, I32(i)), count) for i in (0, 1))
            store(b, narrow(b, kind, b.fadd(minimum, b.fmul(code, scale))), out)
            return context.get_dummy_value()

        address, byte = types.int64, types.uint8
        return types.void(kind, address, byte, byte, address, address), generate

    return spread


spread_run, spread_one = _spread(RUN), _spread(1)


def _code(b: ir.IRBuilder, values: ir.Value, grid: ir.Value) -> ir.Value:
    """uint8 codes of a vector of float32; grid: (minimum, scale or 1, levels)."""
    count = values.type.count
    minimum, scale, levels = (splat(b, b.extract_value(grid, i), count) for i in range(3))
    steps = codes_above(b, b.fdiv(b.fsub(values, minimum), scale), levels)
    return b.trunc(b.bitcast(steps, vector(I32, count)), vector(I8, count))


def codes_above(b: ir.IRBuilder, steps: ir.Value, levels: ir.Value) -> ir.Value:
    """ROUNDER + code of each of so many steps, so that codes are the lowest bits too."""
    count = steps.type.count
    steps = b.select(b.fcmp_ordered(">", steps, levels), levels, steps)
    zeros = constant(F32, 0.0, count)
    steps = b.select(b.fcmp_ordered("<", steps, zeros), zeros, steps)
    return b.fadd(steps, constant(F32, ROUNDER, count))


def _squeeze(count: int) -> Any:
    @emitted
    def squeeze(context, kind, values, others, grid, out):
        """count bytes: the codes of as many values, and of others in the high nibbles.

        values, others: addresses; others may be 0, for none.
        """

        def generate(context, b, signature, args):
            _, values, others, grid, out = args
            codes = _code(b, widen(b, kind, values, count), grid)
            store(b, codes, out)
            with b.if_then(b.icmp_signed("!=", others, others.type(0))):
                high = _code(b, widen(b, kind, others, count), grid)
                store(b, b.or_(codes, b.shl(high, constant(I8, 4, count))), out)
            return context.get_dummy_value()

        address, grids = types.int64, types.UniTuple(types.float32, 3)
        return types.void(kind, address, address, grids, address), generate

    return squeeze


squeeze_run, squeeze_one = _squeeze(RUN), _squeeze(1)


def round_to_half(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """As float16 holds a vector's values; added to zero, which makes 0.0 of -0.0."""
    count = x.type.count
    halves = b.fptrunc(x, vector(F16, count))
    return b.fadd(b.fpext(halves, vector(F32, count)), constant(F32, 0.0, count))


def _folded(b: ir.IRBuilder, values: ir.Value, combine: Callable) -> ir.Value:
    """One value of a vector's, half by half, so that the order is the same on every CPU."""
    while (count := values.type.count // 2) > 0:
        low, high = (
            b.shuffle_vector(values, values, ir.Constant(vector(I32, count), list(lanes)))
            for lanes in (range(count), range(count, 2 * count))
        )
        values = combine(low, high)
    return b.extract_element(values, I32(0))


@emitted
def extremes(context, kind, values):
    """(least, largest) of a whole group at an address; NaN if one of them isn't finite."""

    def generate(context, b, signature, args):
        x = widen(b, kind, args[1], GROUP)
        low = _folded(b, x, lambda x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
        high = _folded(b, x, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
        zero_or_nan = _folded(b, b.fmul(x, constant(F32, 0.0, GROUP)), b.fadd)
        ends = [b.fadd(zero_or_nan, end) for end in (low, high)]
        return context.make_tuple(b, signature.return_type, ends)

    return types.UniTuple(types.float32, 2)(kind, types.int64), generate


@emitted
def value_at(context, kind, address):
    """One stored value as float32."""

    def generate(context, b, signature, args):
        return b.extract_element(widen(b, kind, args[1], 1), I32(0))

    return types.float32(kind, types.int64), generate


@emitted
def to_half(context, value):
    """The nearest float16's bits."""

    def generate(context, b, signature, args):
        return b.bitcast(b.fptrunc(args[0], F16), I16)

    return types.uint16(types.float32), generate


@emitted
def from_half(context, bits):
    def generate(context, b, signature, args):
        return b.fpext(b.bitcast(args[0], F16), F32)

    return types.float32(types.uint16), generate


@emitted
def store_halves(context, first, second, address):
    """Two float16's bits, one after the other."""

    def generate(context, b, signature, args):
        store(b, args[0], args[2])
        store(b, args[1], b.add(args[2], args[2].type(2)))
        return context.get_dummy_value()

    return types.void(types.uint16, types.uint16, types.int64), generate
