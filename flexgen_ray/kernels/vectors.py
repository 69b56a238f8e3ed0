"""Vocabulary of the host's kernels: LLVM code for vectors of numbers, compiled by numba.

Holds loads that widen to float32, stores that narrow, arithmetic, loops, and the decorator that
compiles a kernel. Attention (host_*.py) and quantization (groups.py) are written in it. Knows
neither keys and values nor groups of codes.

A *kind* is a dummy scalar whose numba type names the type that elements are stored in: float32,
uint16 (IEEE half) or int16 (bfloat16), since numba has no 16-bit floats; uint8 or int8 for
elements that are quantized to 8 or 4 bits. An address is an int64. A matrix is the pair
(address, bytes from row to row). A list of rows is the pair (address of an array of addresses,
bytes to add to each).
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

# Packages whose code is compiled into kernels.
_SOURCES = ("flexgen_ray.kernels", "flexgen_ray.quant")

KINDS = {"float32": np.float32(0), "float16": np.uint16(0), "bfloat16": np.int16(0)}
PACKED_KINDS = {8: np.uint8(0), 4: np.int8(0)}

# AVX-512 has 32 registers of 16 floats; otherwise tiles are sized for 16 registers of 8.
WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8

F32, F16 = ir.FloatType(), ir.HalfType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
VECTOR, I32_VECTOR = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VECTOR_BYTES = 4 * LANES
MATRIX = types.UniTuple(types.int64, 2)
Values = list[ir.Value]
# The annotation hides numba's own, which describes the function before it is emitted.
emitted: Callable[[Callable], Any] = intrinsic

# Coefficients of 2**f for f in [-0.5, 0.5], by falling power.
_EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
         2.402264791363012e-1, 6.931472028550421e-1, 1.0)  # fmt: skip
# Adding this to a smaller float32 rounds it to a whole number (ties to even), which then lies in
# the low bits of the sum; subtracting it again gives the rounded number.
ROUNDER = 1.5 * 2**23


def compiled(function: Callable) -> Callable:
    """Compile a kernel at its first call, without the GIL, and cache the code between processes.

    numba's cache notices changes only in the file that defines the function. Its file name includes
    the function's qualified name, so a hash of all sources in that name makes each state of the
    sources use its own cache files. Without a writable folder nothing is cached.
    """
    function.__qualname__ += f"_{hash_sources(*_SOURCES)}"
    try:
        kernel: Any = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder that can be written to
        return numba.njit(nogil=True)(function)
    lock, compile_one = Path(kernel.stats.cache_path) / f"{function.__name__}.lock", kernel.compile

    def compile_alone(signature: Any) -> Any:
        with global_compiler_lock, _locked(lock):
            return compile_one(signature)

    kernel.compile = compile_alone
    return kernel


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Context that one process at a time is in; without a lock where none can be had.

    Several that compiled a kernel at once would each take as long as one. And numba's index would
    keep what one of them wrote last, perhaps with a name that another has for other code.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield


@cache
def hash_sources(*packages: str) -> str:
    """Eight hex digits that change with any Python file of the packages."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(files(package).iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def size_in_bytes(kind: types.Type) -> int:
    """Bytes of one stored element that isn't quantized."""
    return 4 if kind == types.float32 else 2


def is_packed(kind: types.Type) -> bool:
    """True for the kinds of quantized elements."""
    return kind in (types.uint8, types.int8)


def vector_bytes(kind: types.Type) -> int:
    """Bytes of LANES stored elements or, if they are quantized, of their codes."""
    if is_packed(kind):
        return LANES if kind == types.uint8 else LANES // 2
    return LANES * size_in_bytes(kind)


def vector_of(element: ir.Type, count: int) -> ir.VectorType:
    """LLVM's type for a vector."""
    return ir.VectorType(element, count)


def constant(value: float, element: ir.Type = F32, count: int = LANES) -> ir.Constant:
    """Vector that repeats a value known at compile time."""
    return ir.Constant(vector_of(element, count), [value] * count)


ZEROS = constant(0.0)


def splat(b: ir.IRBuilder, x: ir.Value, count: int = LANES) -> ir.Value:
    """Vector that repeats a scalar."""
    empty = ir.Constant(vector_of(x.type, count), ir.Undefined)
    vector = b.insert_element(empty, x, I32(0))
    return shuffle(b, vector, vector, [0] * count)


def shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: Iterable[int]) -> ir.Value:
    """Vector of the named lanes of x and, counted on from its end, of y."""
    indices = list(lanes)
    return b.shuffle_vector(x, y, ir.Constant(vector_of(I32, len(indices)), indices))


def repeat(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Vector of LANES that holds a shorter one again and again."""
    count = vector.type.count
    if count == LANES:
        return vector
    return shuffle(b, vector, vector, [lane % count for lane in range(LANES)])


def load_raw(b: ir.IRBuilder, element: ir.Type, address: ir.Value, count: int = LANES) -> ir.Value:
    """Vector of count elements of an LLVM type, at any address."""
    raw = b.load(b.inttoptr(address, vector_of(element, count).as_pointer()))
    raw.align = 1
    return raw


def load(b: ir.IRBuilder, kind: types.Type, address: ir.Value, count: int = LANES) -> ir.Value:
    """Vector of count stored elements as float32."""
    return widen(b, kind, load_raw(b, _stored_type(kind), address, count))


def load_repeated(b: ir.IRBuilder, kind: types.Type, address: ir.Value, count: int) -> ir.Value:
    """Vector of LANES: count stored elements as float32, again and again."""
    # Repeating comes first, as part of the load; widening then takes one instruction.
    return widen(b, kind, repeat(b, load_raw(b, _stored_type(kind), address, count)))


def _stored_type(kind: types.Type) -> ir.Type:
    return F32 if kind == types.float32 else I16


def widen(b: ir.IRBuilder, kind: types.Type, raw: ir.Value) -> ir.Value:
    """Stored elements (float32, or 16 bits each) as float32."""
    count = raw.type.count
    if kind == types.float32:
        return raw
    if kind == types.uint16:
        return b.fpext(b.bitcast(raw, vector_of(F16, count)), vector_of(F32, count))
    bits = b.shl(b.zext(raw, vector_of(I32, count)), constant(16, I32, count))
    return b.bitcast(bits, vector_of(F32, count))


def narrow(b: ir.IRBuilder, kind: types.Type, value: ir.Value) -> ir.Value:
    """Float32 as it is stored: rounded to nearest, ties to even; NaN stays NaN."""
    count = value.type.count
    if kind == types.float32:
        return value
    if kind == types.uint16:
        return b.fptrunc(value, vector_of(F16, count))
    bits = b.bitcast(value, vector_of(I32, count))
    odd = b.and_(b.lshr(bits, constant(16, I32, count)), constant(1, I32, count))
    rounded = b.add(bits, b.add(odd, constant(0x7FFF, I32, count)))
    nan = b.fcmp_unordered("uno", value, value)
    bits = b.select(nan, constant(0x7FC00000, I32, count), rounded)
    return b.trunc(b.lshr(bits, constant(16, I32, count)), vector_of(I16, count))


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Write a vector or scalar of any type, at any address."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 1


def store_first(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    """Write a vector's first element."""
    store(b, b.extract_element(value, I32(0)), address)


def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Fetch a line into the second-level cache, so that the first keeps what is being read.

    The address need not be valid.
    """
    pointer = b.inttoptr(address, I8.as_pointer())
    signature = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = b.module.declare_intrinsic("llvm.prefetch", [pointer.type], signature)
    b.call(function, [pointer, I32(0), I32(2), I32(1)])


def element_at(b: ir.IRBuilder, address: ir.Value, index: ir.Value, nbytes: int) -> ir.Value:
    """Address of the element with an index, in an array of elements of nbytes each."""
    return b.add(address, b.mul(index, I64(nbytes)))


def row_at(b: ir.IRBuilder, matrix: ir.Value, index: ir.Value) -> ir.Value:
    """Address of a row."""
    return b.add(b.extract_value(matrix, 0), b.mul(b.extract_value(matrix, 1), index))


def listed(b: ir.IRBuilder, rows: ir.Value, index: ir.Value) -> ir.Value:
    """Address with an index in a list of rows."""
    place = element_at(b, b.extract_value(rows, 0), index, 8)
    return b.add(b.load(b.inttoptr(place, I64.as_pointer())), b.extract_value(rows, 1))


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, in one instruction where the CPU has it, so its rounding depends on the CPU."""
    return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Larger float of each lane; y where x is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def smaller(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Smaller of two signed integers."""
    return b.select(b.icmp_signed("<", x, y), x, y)


def exp2(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2**x for x <= 0, within two units in the last place, never below 2**-126.

    x = n + f with a whole n and f in [-0.5, 0.5]: a polynomial gives 2**f, and n is written into
    the exponent's bits of a float32, which makes 2**n.
    """
    x = maximum(b, constant(-126.0), x)
    shifted = b.fadd(x, constant(ROUNDER))
    f = b.fsub(x, b.fsub(shifted, constant(ROUNDER)))
    y = constant(_EXP2[0])
    for coefficient in _EXP2[1:]:
        y = fma(b, y, f, constant(coefficient))
    exponent = b.shl(b.bitcast(shifted, I32_VECTOR), constant(23, I32))
    return b.fmul(y, b.bitcast(b.add(exponent, constant(0x3F800000, I32)), VECTOR))


def sum_neighbours(b: ir.IRBuilder, vectors: Values) -> ir.Value:
    """One vector of sums of n neighbouring lanes, for n vectors; n is a power of two.

    With two vectors of four lanes, [a b c d] and [e f g h] become [a+b c+d e+f g+h]. All sums
    together cost little more than one.
    """
    while len(vectors) > 1:
        even, odd = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)
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
    """Code that branches on an int64: emit(case) for each case, otherwise() for other values."""
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
    """Code for `for index in range(0, end, step): carried = body(index, carried)`.

    start: carried values before the first turn. Returns those after the last one.
    """
    before, inside = b.block, b.append_basic_block("inside")
    after = b.append_basic_block("after")
    b.cbranch(b.icmp_signed(">", end, I64(0)), inside, after)
    b.position_at_end(inside)
    index = b.phi(I64)
    carried = [b.phi(first.type) for first in start]
    results = body(index, carried)
    following = b.add(index, I64(step))
    for phi, first, later in zip([index, *carried], [I64(0), *start], [following, *results],
                                 strict=True):  # fmt: skip
        phi.add_incoming(first, before)
        phi.add_incoming(later, b.block)
    last = b.block
    b.cbranch(b.icmp_signed("<", following, end), inside, after)
    b.position_at_end(after)
    merged = [b.phi(first.type) for first in start]
    for phi, first, later in zip(merged, start, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, last)
    return merged


@emitted
def floats_at(context, address):
    """Pointer to float32 at an address."""

    def generate(context, b, signature, args):
        return b.inttoptr(args[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@emitted
def fetch_and_increment(context, address):
    """Add one to the int64 at an address, atomically; returns the number before.

    The caller that gets a number sees all that others wrote before they got theirs.
    """

    def generate(context, b, signature, args):
        pointer = b.inttoptr(args[0], I64.as_pointer())
        return b.atomic_rmw("add", pointer, I64(1), "acq_rel")

    return types.int64(types.int64), generate
