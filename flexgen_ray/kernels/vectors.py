"""LLVM code of vectors of float32: loads that widen, sums, loops. Knows neither keys nor values.

A matrix is the pair (address, bytes from row to row). A dummy scalar names the type its elements
are stored in: float32, uint16 (IEEE half) or int16 (bfloat16), since numba has no 16-bit floats;
uint8 or int8, if they are packed into 8 or 4 bits.

How numba compiles the kernels of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic


def compiled(function: Callable) -> Callable:
    """Compiled at its first call without the GIL, and kept for later runs where that can be."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that can be written to
        return numba.njit(nogil=True)(function)


KINDS = {"float32": np.float32(0), "float16": np.uint16(0), "bfloat16": np.int16(0)}
PACKED_KINDS = {8: np.uint8(0), 4: np.int8(0)}

# 32 registers of 16 floats with AVX-512; else tiles fit 16 registers of 8.
WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8

F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
VECTOR, I32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VECTOR_BYTES = 4 * LANES
MATRIX = types.UniTuple(types.int64, 2)
Values = list[ir.Value]
# mypy takes the decorator's result for what numba's compiler sees.
emitted: Callable[[Callable], Any] = intrinsic

# 2**f for f in [-0.5, 0.5], by falling power.
_EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
         2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # fmt: skip
# Added and subtracted, it rounds a float32 to a whole number, which lies in its low bits between.
_ROUNDER = 1.5 * 2**23


def size_in_bytes(kind: types.Type) -> int:
    return 4 if kind == types.float32 else 2


def is_packed(kind: types.Type) -> bool:
    return kind in (types.uint8, types.int8)


def vector_bytes(kind: types.Type) -> int:
    """Of LANES stored elements, or of their codes."""
    if is_packed(kind):
        return LANES if kind == types.uint8 else LANES // 2
    return LANES * size_in_bytes(kind)


def constant(value: float, element: ir.Type = F32) -> ir.Constant:
    """A vector of LANES times the value."""
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


ZEROS = constant(0.0)


def load(b: ir.IRBuilder, kind: types.Type, address: ir.Value, count: int = LANES) -> ir.Value:
    """count stored elements as float32, again and again until the vector is full."""
    element, size = F32 if kind == types.float32 else I16, size_in_bytes(kind)
    raw = b.load(b.inttoptr(address, ir.VectorType(element, count).as_pointer()))
    raw.align = size
    if count < LANES:
        raw = shuffle(b, raw, raw, [lane % count for lane in range(LANES)])
    if kind == types.float32:
        return raw
    if kind == types.uint16:
        return b.fpext(b.bitcast(raw, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
    return b.bitcast(b.shl(b.zext(raw, I32_VECTOR), constant(16, I32)), VECTOR)


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """A vector of any type."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 2


def store_first(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """A vector's first element."""
    element = b.extract_element(value, I32(0))
    b.store(element, b.inttoptr(address, element.type.as_pointer())).align = 2


def narrow(b: ir.IRBuilder, kind: types.Type, value: ir.Value) -> ir.Value:
    """As it is stored: rounded to nearest, ties to even; what is not a number stays so."""
    if kind == types.float32:
        return value
    if kind == types.uint16:
        return b.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
    bits = b.bitcast(value, I32_VECTOR)
    odd = b.and_(b.lshr(bits, constant(16, I32)), constant(1, I32))
    rounded = b.lshr(b.add(bits, b.add(odd, constant(0x7FFF, I32))), constant(16, I32))
    nan = b.fcmp_unordered("uno", value, value)
    bits = b.select(nan, constant(0x7FC0, I32), rounded)
    return b.trunc(bits, ir.VectorType(I16, LANES))


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """y where x is not a number."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def exp2(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2**x for x <= 0, within two units in the last place, never below 2**-126."""
    x = maximum(b, constant(-126.0), x)
    shifted = b.fadd(x, constant(_ROUNDER))
    f = b.fsub(x, b.fsub(shifted, constant(_ROUNDER)))
    y = constant(_EXP2[0])
    for coefficient in _EXP2[1:]:
        y = fma(b, y, f, constant(coefficient))
    exponent = b.shl(b.bitcast(shifted, I32_VECTOR), constant(23, I32))
    return b.fmul(y, b.bitcast(b.add(exponent, constant(0x3F800000, I32)), VECTOR))


def shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def splat(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """A vector of LANES times the scalar."""
    empty = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    vector = b.insert_element(empty, x, I32(0))
    return shuffle(b, vector, vector, [0] * LANES)


def plus(b: ir.IRBuilder, address: ir.Value, count: ir.Value, nbytes: int) -> ir.Value:
    """The address of an element, count elements of so many bytes further."""
    return b.add(address, b.mul(count, I64(nbytes)))


def row_at(b: ir.IRBuilder, matrix: ir.Value, index: ir.Value) -> ir.Value:
    """The row's address."""
    return b.add(b.extract_value(matrix, 0), b.mul(b.extract_value(matrix, 1), index))


def smaller(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Into the second cache, lest it crowd out the first. The address need not be valid."""
    pointer = b.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = b.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
    b.call(function, [pointer, I32(0), I32(2), I32(1)])


def sums_of_neighbours(b: ir.IRBuilder, vectors: Values) -> ir.Value:
    """One vector of sums over as many neighbouring lanes as there are vectors, in order.

    The number of vectors is a power of two. All sums together cost little more than one.
    """
    while len(vectors) > 1:
        even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(shuffle(b, x, y, even), shuffle(b, x, y, odd)) for x, y in pairs]
    return vectors[0]


def emit_switch(
    b: ir.IRBuilder,
    value: ir.Value,
    cases: Iterable[int],
    emit: Callable[[int], None],
    otherwise: Callable[[], None] | None = None,
) -> None:
    """emit(case) for the case that an int64 is, or else otherwise()."""
    after, default = b.append_basic_block("after"), b.append_basic_block("default")
    switch = b.switch(value, default)
    for case in cases:
        block = b.append_basic_block(f"case_{case}")
        switch.add_case(I64(case), block)
        b.position_at_end(block)
        emit(case)
        b.branch(after)
    b.position_at_end(default)
    if otherwise is not None:
        otherwise()
    b.branch(after)
    b.position_at_end(after)


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


@emitted
def take_next(context, address):
    """Atomically adds one to the int64 at the address; returns what was there."""

    def generate(context, b, signature, args):
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, I64(1), "monotonic")

    return types.int64(types.int64), generate
