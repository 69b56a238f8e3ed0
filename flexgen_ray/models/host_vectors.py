"""LLVM code of vectors of float32: loads that widen, sums, loops. Knows neither keys nor values.

A matrix is the pair (address, bytes from row to row). A dummy scalar names the type its elements
are stored in: float32, uint16 (IEEE half) or int16 (bfloat16), since numba has no 16-bit floats.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import binding, ir
from numba.core import types

KINDS = {"float32": np.float32(0), "float16": np.uint16(0), "bfloat16": np.int16(0)}

# 32 registers of 16 floats with AVX-512; else tiles fit 16 registers of 8.
WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
ZEROS = ir.Constant(VECTOR, [0.0] * LANES)
Values = list[ir.Value]


def element(kind: types.Type) -> ir.Type:
    return F32 if kind == types.float32 else I16


def size_in_bytes(kind: types.Type) -> int:
    return 4 if kind == types.float32 else 2


def widen(b: ir.IRBuilder, kind: types.Type, raw: ir.Value, like: Callable) -> ir.Value:
    """like: makes the type of the same shape as raw from an element type."""
    if kind == types.float32:
        return raw
    if kind == types.uint16:
        return b.fpext(b.bitcast(raw, like(ir.HalfType())), like(F32))
    bits = b.zext(raw, like(I32))
    return b.bitcast(b.mul(bits, constant(like(I32), 1 << 16)), like(F32))


def constant(kind: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * LANES if isinstance(kind, ir.VectorType) else value)


def vector_type(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def load(b: ir.IRBuilder, kind: types.Type, address: ir.Value) -> ir.Value:
    raw = b.load(b.inttoptr(address, vector_type(element(kind)).as_pointer()))
    raw.align = size_in_bytes(kind)
    return widen(b, kind, raw, vector_type)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def splat(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    vector = b.insert_element(ir.Constant(VECTOR, ir.Undefined), x, I32(0))
    return shuffle(b, vector, vector, [0] * LANES)


def row_at(b: ir.IRBuilder, matrix: ir.Value, index: ir.Value) -> ir.Value:
    """The row's address."""
    return b.add(b.extract_value(matrix, 0), b.mul(b.extract_value(matrix, 1), index))


def first_rows(b: ir.IRBuilder, matrix: ir.Value, count: int) -> Values:
    """The first rows' addresses."""
    return [row_at(b, matrix, I64(index)) for index in range(count)]


def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """The address need not be valid."""
    pointer = b.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = b.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
    b.call(function, [pointer, I32(0), I32(3), I32(1)])


def packed_sums(b: ir.IRBuilder, vectors: Values) -> ir.Value:
    """One vector of each vector's sum; a power of two of them, at most LANES.

    Halves are added and packed together, so all sums cost little more than one.
    """
    width, count = LANES, len(vectors)
    while len(vectors) > 1:
        half = width // 2
        low = [lane + i for lane in range(0, 2 * LANES, width) for i in range(half)]
        high = [lane + half for lane in low]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(shuffle(b, x, y, low), shuffle(b, x, y, high)) for x, y in pairs]
        width = half
    (vector,) = vectors
    while width > 1:
        half = width // 2
        low = [lane + i for lane in range(0, count * width, width) for i in range(half)]
        high = [lane + half for lane in low]
        vector = b.fadd(shuffle(b, vector, vector, low), shuffle(b, vector, vector, high))
        width = half
    return vector


def emit_loop(
    b: ir.IRBuilder,
    end: ir.Value,
    step: int,
    start: Values,
    body: Callable[[ir.Value, Values], Values],
) -> Values:
    """body(index, carried) for index in range(0, end, step); what the last one returned."""
    before, inside = b.block, b.append_basic_block("inside")
    after = b.append_basic_block("after")
    b.cbranch(b.icmp_signed(">", end, I64(0)), inside, after)
    b.position_at_end(inside)
    index = b.phi(I64)
    carried = [b.phi(VECTOR) for _ in start]
    results = body(index, carried)
    following = b.add(index, I64(step))
    for phi, first, later in zip([index, *carried], [I64(0), *start], [following, *results],
                                 strict=True):  # fmt: skip
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    last = b.block
    b.cbranch(b.icmp_signed("<", following, end), inside, after)
    b.position_at_end(after)
    merged = [b.phi(VECTOR) for _ in start]
    for phi, first, later in zip(merged, start, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, last)
    return merged
