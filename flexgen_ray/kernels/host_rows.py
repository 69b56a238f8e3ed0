"""Rows of keys or values as vectors of float32, plain or packed: LLVM code within numba functions.

A vector holds as many bytes of a row as make LANES elements. The last one holds a row's last bytes,
so that nothing beside the row is read. A packed row (quant/packing.py has its layout) has the
elements in an order of its own: those of low nibbles come first in each vector. They get the very
values that unpacking gives. Knows how rows are stored; not what they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba.core import types

from flexgen_ray.kernels.vectors import (
    I8,
    I16,
    I32_VECTOR,
    I64,
    KINDS,
    LANES,
    VECTOR,
    Values,
    emit_loop,
    emit_switch,
    emitted,
    fma,
    is_packed,
    load,
    narrow,
    plus,
    shuffle,
    size_in_bytes,
    smaller,
    store_first,
    vector_bytes,
)
from flexgen_ray.quant.packing import GROUP, PARAMETER_BYTES, code_bytes, group_bytes

_HALF = LANES // 2
_TYPES = (types.float32, types.uint16, types.int16)
DTYPES = {name: code for code, name in enumerate(KINDS)}


@lru_cache
def order(head_dim: int, bits: int) -> np.ndarray:
    """The element in each lane of a packed row's vectors.

    -1 where there is none, or the vector before has it too.
    """
    in_bytes, width = _elements_in_bytes(head_dim, bits), LANES * bits // 8
    vectors = []
    for start in range(0, len(in_bytes), width):
        at = min(start, len(in_bytes) - width)
        vector = in_bytes[at : at + width].copy()
        vector[: start - at] = -1
        vectors.append(vector.T.ravel())
    return np.concatenate(vectors)


def _elements_in_bytes(head_dim: int, bits: int) -> np.ndarray:
    """[bytes of codes, codes a byte]"""
    found = []
    for first in range(0, head_dim, GROUP):
        values = min(GROUP, head_dim - first)
        nbytes = group_bytes(values, bits)
        for byte in range(nbytes):
            inside = range(byte, nbytes * 8 // bits, nbytes)
            found.append([first + i if i < values else -1 for i in inside])
    found += [[-1] * (8 // bits)] * (code_bytes(head_dim, bits) - len(found))
    return np.array(found, np.int64)


def lanes_in(b: ir.IRBuilder, kind: types.Type, nbytes: ir.Value) -> ir.Value:
    """Of a row's vectors."""
    width = vector_bytes(kind)
    return b.mul(b.udiv(b.add(nbytes, I64(width - 1)), I64(width)), I64(LANES))


def offset(b: ir.IRBuilder, kind: types.Type, nbytes: ir.Value, lane: ir.Value) -> ir.Value:
    """In bytes, of the vector that begins at a lane."""
    width = vector_bytes(kind)
    if width < LANES:
        at = b.udiv(lane, I64(LANES // width))
    else:
        at = b.mul(lane, I64(width // LANES))
    return smaller(b, at, b.sub(nbytes, I64(width)))


def parameters(
    b: ir.IRBuilder, kind: types.Type, row: ir.Value, nbytes: ir.Value, lane: ir.Value
) -> Values:
    """What read needs for the vector that begins at a lane, and for its whole group."""
    if not is_packed(kind):
        return []
    place = plus(b, b.add(row, nbytes), b.udiv(lane, I64(GROUP)), PARAMETER_BYTES)
    raw = b.load(b.inttoptr(place, ir.VectorType(I16, 2).as_pointer()))
    raw.align = 1
    halves = b.bitcast(raw, ir.VectorType(ir.HalfType(), 2))
    pair = b.fpext(halves, ir.VectorType(ir.FloatType(), 2))
    minimum, scale = (shuffle(b, pair, pair, [i] * LANES) for i in range(2))
    if kind == types.int8:
        scale = b.fmul(scale, ir.Constant(VECTOR, [1.0] * _HALF + [1 / 16] * _HALF))
    return [minimum, scale]


def read(
    b: ir.IRBuilder,
    kind: types.Type,
    vector: ir.Value,
    parameters: Values,
    part: int = LANES,
    i: int = 0,
) -> ir.Value:
    """Of the vector at an address the i-th part, again and again until LANES are full.

    4-bit codes come as a whole only.
    """
    if not parameters:
        return load(b, kind, b.add(vector, I64(i * part * size_in_bytes(kind))), part)
    if kind == types.uint8:
        codes = _bytes(b, b.add(vector, I64(i * part)), part)
    else:
        # High nibbles stay where they are, 16 times too large; so their scale is smaller.
        mask = [0x0F] * _HALF + [0xF0] * _HALF
        codes = _bytes(b, vector, _HALF)
        codes = b.and_(codes, ir.Constant(codes.type, mask))
    minimum, scale = parameters
    return fma(b, b.sitofp(b.zext(codes, I32_VECTOR), VECTOR), scale, minimum)


def _bytes(b: ir.IRBuilder, address: ir.Value, count: int) -> ir.Value:
    """Count bytes, again and again until LANES are full."""
    raw = b.load(b.inttoptr(address, ir.VectorType(I8, count).as_pointer()))
    raw.align = 1
    return shuffle(b, raw, raw, [lane % count for lane in range(LANES)])


def emit_vectors(
    b: ir.IRBuilder,
    kind: types.Type,
    rows: Values,
    nbytes: ir.Value,
    start: Values,
    body: Callable[[ir.Value, ir.Value, list[Values], Values], Values],
) -> Values:
    """body(lane, offset in bytes, parameters of each row, carried) for the rows' vectors."""
    lanes = lanes_in(b, kind, nbytes)

    def in_group(first: ir.Value, carried: Values) -> Values:
        found = [parameters(b, kind, row, nbytes, first) for row in rows]

        def step(i: ir.Value, carried: Values) -> Values:
            lane = b.add(first, i)
            return body(lane, offset(b, kind, nbytes, lane), found, carried)

        if not found[0]:
            return step(I64(0), carried)
        return emit_loop(b, smaller(b, b.sub(lanes, first), I64(GROUP)), LANES, carried, step)

    together = GROUP if is_packed(kind) else LANES
    return emit_loop(b, lanes, together, start, in_group)


@emitted
def spread(context, dtype, row, order, width, into):
    """into[lane] = row[order[lane]], or zero, as float32; dtype: of DTYPES; order: its address."""

    def generate(context, b, signature, args):
        dtype, row, order, width, into = args

        def emit(code):
            kind = _TYPES[code]

            def one(lane, _):
                element, valid = _element(b, order, lane)
                place = plus(b, row, b.select(valid, element, I64(0)), size_in_bytes(kind))
                value = load(b, kind, place, count=1)
                value = b.select(valid, value, ir.Constant(VECTOR, [0.0] * LANES))
                store_first(b, value, plus(b, into, lane, 4))
                return []

            emit_loop(b, width, 1, [], one)

        emit_switch(b, dtype, range(len(_TYPES)), emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@emitted
def collect(context, dtype, lanes, order, width, row):
    """row[order[lane]] = lanes[lane], which are float32 and may be overwritten; undoes spread."""

    def generate(context, b, signature, args):
        dtype, lanes, order, width, row = args

        def emit(code):
            kind = _TYPES[code]

            def one(lane, _):
                element, valid = _element(b, order, lane)
                place = plus(b, lanes, lane, 4)
                value = narrow(b, kind, load(b, types.float32, place, count=1))
                target = plus(b, row, element, size_in_bytes(kind))
                store_first(b, value, b.select(valid, target, place))
                return []

            emit_loop(b, width, 1, [], one)

        emit_switch(b, dtype, range(len(_TYPES)), emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _element(b: ir.IRBuilder, order: ir.Value, lane: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The order's entry for a lane, and whether there is one."""
    element = b.load(b.inttoptr(plus(b, order, lane, 8), I64.as_pointer()))
    return element, b.icmp_signed(">=", element, I64(0))
