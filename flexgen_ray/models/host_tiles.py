"""Host attention's inner loops, for use within numba functions (host_vectors has their parts).

Knows dot products and weighted sums of a few rows; no softmax and no threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flexgen_ray.models.host_vectors import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    WIDE,
    ZEROS,
    Values,
    element,
    emit_loop,
    first_rows,
    fma,
    load,
    packed_sums,
    prefetch,
    row_at,
    shuffle,
    size_in_bytes,
    splat,
    widen,
)

KEYS_AT_ONCE = 4 if WIDE else 2
COLUMNS_OF_FOUR_HEADS = 4 if WIDE else 2

_MATRIX = types.UniTuple(types.int64, 2)
# mypy takes the decorator's result for what numba's compiler sees.
_intrinsic: Callable[[Callable], Any] = intrinsic


def _dots(
    b: ir.IRBuilder, kind: types.Type, dim: ir.Value, queries: Values, keys: Values, ahead: Values
) -> Values:
    """Vectors whose sums are the dot products, by query, then by key; prefetches rows ahead."""
    last = b.sub(dim, I64(LANES))

    def step(d: ir.Value, sums: Values) -> Values:
        offset = b.mul(b.select(b.icmp_signed("<", d, last), d, last), I64(size_in_bytes(kind)))
        k = [load(b, kind, b.add(row, offset)) for row in keys]
        for row in ahead:
            prefetch(b, b.add(row, offset))
        q = [load(b, types.float32, b.add(row, b.mul(d, I64(4)))) for row in queries]
        pairs = [(x, y) for x in q for y in k]
        return [fma(b, x, y, z) for (x, y), z in zip(pairs, sums, strict=True)]

    return emit_loop(b, dim, LANES, [ZEROS] * (len(queries) * len(keys)), step)


def score_tile(heads: int, keys: int) -> Callable:
    """tile(kind, dim, queries, keys, scores, ahead): scores[h, k] = queries[h] . keys[k].

    queries and scores are float32; heads * keys is a power of two, at most LANES. ahead: rows that
    are read soon; several heads compute for so long that memory would idle, so they prefetch these.
    dim is at least LANES. If it is no multiple, vectors overlap: a key's last one holds its last
    LANES elements, and so must the queries', with zeros for those already counted.
    """

    @_intrinsic
    def tile(context, kind, dim, queries, key_rows, scores, ahead):
        def generate(context, b, signature, args):
            _, dim, queries, key_rows, scores, ahead = args
            q, k = first_rows(b, queries, heads), first_rows(b, key_rows, keys)
            # Prefetching follows one stream well and several poorly: alone, keys go in order.
            if heads > 1:
                dots = _dots(b, kind, dim, q, k, first_rows(b, ahead, keys))
            else:
                dots = [dot for row in k for dot in _dots(b, kind, dim, q, [row], [])]
            sums = packed_sums(b, dots)
            for head, row in enumerate(first_rows(b, scores, heads)):
                part = shuffle(b, sums, sums, list(range(head * keys, (head + 1) * keys)))
                b.store(part, b.inttoptr(row, part.type.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(kind, types.int64, *[_MATRIX] * 4), generate

    return tile


def mix_tile(heads: int, columns: int) -> Callable:
    """tile(kind, count, weights, values, sums, ahead): sums[h, :] += weights[h, :] @ values.

    count: rows of values, of which columns * LANES elements are taken. weights and sums are
    float32. ahead: as for score_tile.
    """

    @_intrinsic
    def tile(context, kind, count, weights, values, sums, ahead):
        def generate(context, b, signature, args):
            _, count, weights, values, sums, ahead = args
            w, a = first_rows(b, weights, heads), first_rows(b, sums, heads)
            size = LANES * size_in_bytes(kind)

            def step(j, carried):
                row, later = row_at(b, values, j), row_at(b, ahead, j)
                v = [load(b, kind, b.add(row, I64(c * size))) for c in range(columns)]
                for offset in range(0, columns * size if heads > 1 else 0, 64):
                    prefetch(b, b.add(later, I64(offset)))
                at = [b.inttoptr(b.add(x, b.mul(j, I64(4))), F32.as_pointer()) for x in w]
                pairs = [(x, y) for x in [splat(b, b.load(p)) for p in at] for y in v]
                return [fma(b, x, y, z) for (x, y), z in zip(pairs, carried, strict=True)]

            places = [b.add(row, I64(c * LANES * 4)) for row in a for c in range(columns)]
            first = [load(b, types.float32, place) for place in places]
            for place, total in zip(places, emit_loop(b, count, 1, first, step), strict=True):
                b.store(total, b.inttoptr(place, VECTOR.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(kind, types.int64, *[_MATRIX] * 4), generate

    return tile


@_intrinsic
def largest_of(context, address, count):
    """The largest of count float32; count is a multiple of LANES."""

    def generate(context, b, signature, args):
        address, count = args

        def step(i, carried):
            vector = load(b, types.float32, b.add(address, b.mul(i, I64(4))))
            return [b.select(b.fcmp_ordered(">", vector, carried[0]), vector, carried[0])]

        (vector,) = emit_loop(b, count, LANES, [ir.Constant(VECTOR, [-np.inf] * LANES)], step)
        width = LANES
        while width > 1:
            width //= 2
            low = shuffle(b, vector, vector, list(range(width)))
            high = shuffle(b, vector, vector, list(range(width, 2 * width)))
            vector = b.select(b.fcmp_ordered(">", high, low), high, low)
        return b.extract_element(vector, I32(0))

    return types.float32(types.int64, types.int64), generate


@_intrinsic
def size_of(context, kind):
    """Bytes of a stored element."""
    return types.int64(kind), lambda context, b, signature, args: I64(size_in_bytes(kind))


@_intrinsic
def load_element(context, kind, address):
    def generate(context, b, signature, args):
        raw = b.load(b.inttoptr(args[1], element(kind).as_pointer()))
        return widen(b, kind, raw, lambda element: element)

    return types.float32(kind, types.int64), generate


@_intrinsic
def store_element(context, kind, address, value):
    """Rounds to nearest, ties to even; what is not a number stays so."""

    def generate(context, b, signature, args):
        _, address, value = args
        if kind == types.uint16:
            value = b.bitcast(b.fptrunc(value, ir.HalfType()), I16)
        elif kind == types.int16:
            bits = b.bitcast(value, I32)
            odd = b.and_(b.lshr(bits, I32(16)), I32(1))
            rounded = b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16))
            nan = b.fcmp_unordered("uno", value, value)
            value = b.trunc(b.select(nan, I32(0x7FC0), rounded), I16)
        b.store(value, b.inttoptr(address, element(kind).as_pointer()))
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.float32), generate


@_intrinsic
def bits_of(context, x):
    """A float32's bits as int32, or the other way round."""
    if x == types.float32:
        return types.int32(x), lambda context, b, signature, args: b.bitcast(args[0], I32)
    return types.float32(x), lambda context, b, signature, args: b.bitcast(args[0], F32)


@_intrinsic
def take_next(context, address):
    """Atomically adds one to the int64 at the address; returns what was there."""

    def generate(context, b, signature, args):
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, I64(1), "monotonic")

    return types.int64(types.int64), generate


def compiled(function: Callable) -> Callable:
    """Compiled at its first call without the GIL, and kept for later runs where that can be."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that can be written to
        return numba.njit(nogil=True)(function)
