"""Rows of keys or values as vectors of float32: LLVM code within numba functions.

A row is one token's key or value of one head, plain or packed. A vector holds as many bytes of the
row as make LANES elements; the last vector holds the row's last bytes, so that nothing beside the
row is read:

    row of 20 elements, LANES = 8:   [0 .. 7]  [8 .. 15]  [12 .. 19]

A packed row (quant/packing.py has its layout) has its elements in another order, because the low
nibbles of a vector's bytes come before the high ones. Elements get the very values that
dequantization gives. Knows how rows are stored; not what they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba.core import types

from flexgen_ray.kernels.vectors import (
    I8,
    I32,
    I32_VECTOR,
    I64,
    KINDS,
    LANES,
    VECTOR,
    ZEROS,
    Values,
    element_at,
    emit_loop,
    emit_switch,
    emitted,
    fma,
    is_packed,
    load,
    load_raw,
    load_repeated,
    narrow,
    repeat,
    shuffle,
    size_in_bytes,
    smaller,
    splat,
    store,
    store_first,
    vector_bytes,
)
from flexgen_ray.quant.packing import GROUP, PARAMETER_BYTES, code_bytes, group_bytes

_HALF = LANES // 2
# Entries that a list of rows has beyond those it is for.
ROOM = 8
_TYPES = (types.float32, types.uint16, types.int16)
DTYPES = {name: code for code, name in enumerate(KINDS)}


@lru_cache
def lane_order(head_dim: int, bits: int) -> np.ndarray:
    """Index of the element in each lane of a packed row's vectors, int64 [vectors * LANES].

    -1 where there is no element, or where the vector before holds it too.
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
    """Index of the element of each code, int64 [bytes of codes, codes per byte]; -1 for none."""
    elements = []
    for first in range(0, head_dim, GROUP):
        values = min(GROUP, head_dim - first)
        nbytes = group_bytes(values, bits)
        for byte in range(nbytes):
            inside = range(byte, nbytes * 8 // bits, nbytes)
            elements.append([first + i if i < values else -1 for i in inside])
    elements += [[-1] * (8 // bits)] * (code_bytes(head_dim, bits) - len(elements))
    return np.array(elements, np.int64)


def count_lanes(b: ir.IRBuilder, kind: types.Type, nbytes: ir.Value) -> ir.Value:
    """Number of lanes in all vectors of a row of nbytes."""
    width = vector_bytes(kind)
    return b.mul(b.udiv(b.add(nbytes, I64(width - 1)), I64(width)), I64(LANES))


def vector_offset(b: ir.IRBuilder, kind: types.Type, nbytes: ir.Value, lane: ir.Value) -> ir.Value:
    """Offset in bytes, within a row of nbytes, of the vector that begins at a lane."""
    width = vector_bytes(kind)
    if width < LANES:
        at = b.udiv(lane, I64(LANES // width))
    else:
        at = b.mul(lane, I64(width // LANES))
    return smaller(b, at, b.sub(nbytes, I64(width)))


def load_parameters(
    b: ir.IRBuilder, kind: types.Type, row: ir.Value, nbytes: ir.Value, lane: ir.Value
) -> Values:
    """Minimum and scale for the vector that begins at a lane, and for the rest of its group.

    An empty list for plain rows. Minimums and scales are stored behind the row's nbytes of codes.
    """
    if not is_packed(kind):
        return []
    place = element_at(b, b.add(row, nbytes), b.udiv(lane, I64(GROUP)), PARAMETER_BYTES)
    pair = load(b, types.uint16, place, 2)
    minimum, scale = (shuffle(b, pair, pair, [i] * LANES) for i in range(2))
    if kind == types.int8:
        scale = b.fmul(scale, ir.Constant(VECTOR, [1.0] * _HALF + [1 / 16] * _HALF))
    return [minimum, scale]


def read_vector(
    b: ir.IRBuilder,
    kind: types.Type,
    vector: ir.Value,
    parameters: Values,
    part: int = LANES,
    i: int = 0,
) -> ir.Value:
    """Part i of the vector at an address, as float32, again and again until LANES are full.

    parameters: from load_parameters; part: elements of a part, all LANES for 4-bit codes.
    """
    if not parameters:
        return load_repeated(b, kind, b.add(vector, I64(i * part * size_in_bytes(kind))), part)
    if kind == types.uint8:
        codes = repeat(b, load_raw(b, I8, b.add(vector, I64(i * part)), part))
    else:
        # High nibbles stay where they are, 16 times too large; so their scale is smaller.
        mask = [0x0F] * _HALF + [0xF0] * _HALF
        codes = repeat(b, load_raw(b, I8, vector, _HALF))
        codes = b.and_(codes, ir.Constant(codes.type, mask))
    minimum, scale = parameters
    return fma(b, b.sitofp(b.zext(codes, I32_VECTOR), VECTOR), scale, minimum)


def loop_over_vectors(
    b: ir.IRBuilder,
    kind: types.Type,
    rows: Values,
    nbytes: ir.Value,
    start: Values,
    body: Callable[[ir.Value, ir.Value, list[Values], Values], Values],
) -> Values:
    """Loop over the vectors of some rows side by side; returns the values carried at the end.

    body(lane, offset in bytes, parameters of each row, carried) returns the new carried values.
    Packed rows take two loops, so that parameters are loaded once a group.
    """
    lanes = count_lanes(b, kind, nbytes)

    def in_group(first: ir.Value, carried: Values) -> Values:
        groups = [load_parameters(b, kind, row, nbytes, first) for row in rows]

        def step(i: ir.Value, carried: Values) -> Values:
            lane = b.add(first, i)
            return body(lane, vector_offset(b, kind, nbytes, lane), groups, carried)

        if not groups[0]:
            return step(I64(0), carried)
        return emit_loop(b, smaller(b, b.sub(lanes, first), I64(GROUP)), LANES, carried, step)

    together = GROUP if is_packed(kind) else LANES
    return emit_loop(b, lanes, together, start, in_group)


@emitted
def page_in(context, table, index):
    """Entry of a table, int32 at an address."""

    def generate(context, b, signature, args):
        place = element_at(b, args[0], args[1], 4)
        return b.sext(b.load(b.inttoptr(place, I32.as_pointer())), I64)

    return types.int64(types.int64, types.int64), generate


@emitted
def list_rows(context, address, step, count, into):
    """into[i] = address + i * step for i < count; up to ROOM - 1 entries beyond are overwritten."""

    def generate(context, b, signature, args):
        address, step, count, into = args
        steps = b.mul(splat(b, step, ROOM), ir.Constant(ir.VectorType(I64, ROOM), [*range(ROOM)]))

        def some(i, _):
            rows = b.add(splat(b, b.add(address, b.mul(i, step)), ROOM), steps)
            store(b, rows, element_at(b, into, i, 8))
            return []

        emit_loop(b, count, ROOM, [], some)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@emitted
def spread_query(context, dtype, row, lane_order, width, into):
    """Copy a query into the lanes of packed keys: into[lane] = row[lane_order[lane]], or zero.

    dtype: the row's, a value of DTYPES; row, lane_order, into: addresses; into is float32.
    """

    def generate(context, b, signature, args):
        dtype, row, lane_order, width, into = args

        def emit(code):
            kind = _TYPES[code]

            def one(lane, _):
                element, valid = _element(b, lane_order, lane)
                place = element_at(b, row, b.select(valid, element, I64(0)), size_in_bytes(kind))
                value = load_repeated(b, kind, place, count=1)
                value = b.select(valid, value, ZEROS)
                store_first(b, value, element_at(b, into, lane, 4))
                return []

            emit_loop(b, width, 1, [], one)

        emit_switch(b, dtype, range(len(_TYPES)), emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@emitted
def collect_result(context, dtype, lanes, lane_order, width, row):
    """Undo spread_query for a result: row[lane_order[lane]] = lanes[lane].

    lanes: address of float32, which may be overwritten; the others as for spread_query.
    """

    def generate(context, b, signature, args):
        dtype, lanes, lane_order, width, row = args

        def emit(code):
            kind = _TYPES[code]

            def one(lane, _):
                element, valid = _element(b, lane_order, lane)
                place = element_at(b, lanes, lane, 4)
                value = narrow(b, kind, load(b, types.float32, place, 1))
                target = element_at(b, row, element, size_in_bytes(kind))
                # A lane without an element is written back to where it came from.
                store_first(b, value, b.select(valid, target, place))
                return []

            emit_loop(b, width, 1, [], one)

        emit_switch(b, dtype, range(len(_TYPES)), emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _element(b: ir.IRBuilder, lane_order: ir.Value, lane: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Index of a lane's element, and whether the lane has one."""
    element = b.load(b.inttoptr(element_at(b, lane_order, lane, 8), I64.as_pointer()))
    return element, b.icmp_signed(">=", element, I64(0))
