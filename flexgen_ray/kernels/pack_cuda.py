"""Quantization on CUDA in one pass over memory; bit for bit as pack_plain, except which NaN.

Each program takes some neighbouring groups out of the groups of all vectors. Vectors may end in a
shorter group and lie at odd addresses, so codes, minimum and scale are read and written byte by
byte. Where all groups are whole and vectors aligned, as weights are and caches with heads of a
multiple of 64, unpack takes a variant that moves 16 bytes at a time. Needs Triton.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexgen_ray.quant.packing import (
    GROUP,
    LARGEST,
    PARAMETER_BYTES,
    code_bytes,
    num_groups,
)

_DIMS = 4
_GROUPS_PER_PROGRAM = 32
_WHOLE_GROUPS_PER_PROGRAM = 64
_VECTOR = 16  # bytes of the widest load and store
# These sizes change from pass to pass, and Triton would compile anew for sizes that are 1 or a
# multiple of 16.
_COUNTS = ("total", "n1", "n2", "n3")
_INTEGERS = (*_COUNTS, "size", "middle", *(f"{name}{dim}" for name in "vp" for dim in range(_DIMS)))


def pack(x: Tensor, bits: int, out: Tensor) -> None:
    """Quantize vectors into out; a group with a value beyond LARGEST becomes NaN."""
    _launch(_pack, x, out, bits)


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """Dequantize vectors into out, rounded to its dtype."""
    _launch(_unpack, out, packed, bits)


def _launch(kernel: triton.JITFunction, values: Tensor, packed: Tensor, bits: int) -> None:
    """Run a kernel over all groups; tensors of more than five dimensions take several launches."""
    if values.dim() - 1 > _DIMS:
        for pair in zip(values, packed, strict=True):
            _launch(kernel, *pair, bits)
        return
    size, missing = values.shape[-1], _DIMS + 1 - values.dim()
    values, packed = (x[(None,) * missing] for x in (values, packed))
    total = values[..., 0].numel() * num_groups(size)
    if not total:
        return
    units, constants = _GROUPS_PER_PROGRAM, {"LARGEST": LARGEST}
    if kernel is _unpack and (alignment := whole_alignment(values, packed)):
        kernel, units = _unpack_whole, _WHOLE_GROUPS_PER_PROGRAM
        is_dense = values.is_contiguous() and packed.is_contiguous()
        constants = {"ALIGNMENT": alignment, "IS_DENSE": is_dense}
    with torch.cuda.device_of(values):
        kernel[(triton.cdiv(total, units),)](
            values, packed, total, size, code_bytes(size, bits), *values.shape[1:-1],
            *values.stride()[:-1], *packed.stride()[:-1],
            BITS=bits, GROUP=GROUP, UNITS=units, **constants,
        )  # fmt: skip


def whole_alignment(values: Tensor, packed: Tensor) -> int:
    """Bytes, 4 to 16, to which packed vectors are aligned; 0 where whole groups can't be unpacked.

    They can where every group has GROUP values, every vector of values is aligned to 16 bytes, and
    every packed one to 4.
    """
    if values.shape[-1] % GROUP or address_divisor(values) % _VECTOR:
        return 0
    alignment = gcd(address_divisor(packed), _VECTOR)
    return alignment if alignment >= PARAMETER_BYTES else 0


def address_divisor(x: Tensor) -> int:
    """Common divisor of the addresses of all vectors."""
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return gcd(x.data_ptr(), *(step * x.element_size() for length, step in outer if length > 1))


@triton.jit
def _place(
    unit, size, n1, n2, n3, v0, v1, v2, v3, p0, p1, p2, p3, BITS: tl.constexpr, GROUP: tl.constexpr
):
    """Position of groups, by their numbers among all groups of all vectors.

    v0 to v3 and p0 to p3: strides of values and of packed vectors over the outer dimensions, whose
    sizes from the second on are n1 to n3.
    Returns each group's number in its vector, its number of values and of bytes of codes, the
    offset of its values, and the offset of its packed vector.
    """
    groups = tl.cdiv(size, GROUP)
    group, vector = unit % groups, unit // groups
    i3, rest = vector % n3, vector // n3
    i2, rest = rest % n2, rest // n2
    i1, i0 = rest % n1, rest // n1
    # 32-bit division is far cheaper, but offsets may need 64 bits.
    i0, i1, i2, i3 = i0.to(tl.int64), i1.to(tl.int64), i2.to(tl.int64), i3.to(tl.int64)
    n = tl.minimum(size - group * GROUP, GROUP)
    nbytes = n if BITS == 8 else (n + 1) // 2
    values = i0 * v0 + i1 * v1 + i2 * v2 + i3 * v3 + group * GROUP
    return group, n, nbytes, values, i0 * p0 + i1 * p1 + i2 * p2 + i3 * p3


@triton.jit
def _load_half(address, live):
    """Float16 at any address, as float32."""
    low = tl.load(address, mask=live, other=0).to(tl.uint16)
    high = tl.load(address + 1, mask=live, other=0).to(tl.uint16)
    return _float_of_half(low | (high << 8))


@triton.jit
def _float_of_half(bits):
    """Float32 with the value of a float16, by its bits."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _store_half(address, value, live):
    """Write a float32 that float16 can hold, at any address."""
    bits = value.to(tl.float16).to(tl.uint16, bitcast=True)
    tl.store(address, (bits & 255).to(tl.uint8), mask=live)
    tl.store(address + 1, (bits >> 8).to(tl.uint8), mask=live)


@triton.jit(do_not_specialize=_COUNTS)
def _unpack(
    values, packed, total, size, middle, n1, n2, n3, v0, v1, v2, v3, p0, p1, p2, p3,
    LARGEST: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live = unit < total
    group, n, nbytes, place, start = _place(
        unit, size, n1, n2, n3, v0, v1, v2, v3, p0, p1, p2, p3, BITS, GROUP
    )
    parameters = packed + start + middle + group * 4
    minimum = _load_half(parameters, live)[:, None]
    scale = _load_half(parameters + 2, live)[:, None]
    i = tl.arange(0, GROUP * BITS // 8)[None, :]
    within = live[:, None] & (i < nbytes[:, None])
    codes = packed + (start + group * (GROUP * BITS // 8))[:, None] + i
    code = tl.load(codes, mask=within, other=0)
    out = values + place[:, None] + i
    kind = values.dtype.element_ty
    if BITS == 8:
        tl.store(out, (minimum + code.to(tl.float32) * scale).to(kind), mask=within)
    else:
        low, high = code & 15, code >> 4
        tl.store(out, (minimum + low.to(tl.float32) * scale).to(kind), mask=within)
        within = live[:, None] & (i < (n - nbytes)[:, None])
        out += nbytes[:, None]
        tl.store(out, (minimum + high.to(tl.float32) * scale).to(kind), mask=within)


@triton.jit(do_not_specialize=_INTEGERS)
def _unpack_whole(
    values, packed, total, size, middle, n1, n2, n3, v0, v1, v2, v3, p0, p1, p2, p3,
    BITS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr,
    ALIGNMENT: tl.constexpr, IS_DENSE: tl.constexpr,
):  # fmt: skip
    """Unpack where whole_alignment gives ALIGNMENT; IS_DENSE: vectors lie one after the other."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live = unit < total
    groups = size // GROUP
    if IS_DENSE:
        group = unit % groups
        place = unit.to(tl.int64) * GROUP
        start = (unit // groups).to(tl.int64) * (middle + groups * 4)
    else:
        group, _, _, place, start = _place(
            unit, size, n1, n2, n3, v0, v1, v2, v3, p0, p1, p2, p3, BITS, GROUP
        )
    parameters = tl.multiple_of(packed + start + middle + group * 4, 4)
    pair = tl.load(parameters.to(tl.pointer_type(tl.uint32)), mask=live, other=0)
    minimum = _float_of_half(pair & 0xFFFF)[:, None]
    scale = _float_of_half(pair >> 16)[:, None]
    i, live = tl.arange(0, GROUP * BITS // 8)[None, :], live[:, None]
    codes = tl.multiple_of(packed + start + group * (GROUP * BITS // 8), ALIGNMENT)
    # 32 bits wide, since GPUs convert those to floats faster than bytes.
    code = tl.load(codes[:, None] + i, mask=live, other=0).to(tl.uint32)
    out = tl.multiple_of(values + place, 16)[:, None] + i
    kind = values.dtype.element_ty
    if BITS == 8:
        tl.store(out, (minimum + code.to(tl.float32) * scale).to(kind), mask=live)
    else:
        low, high = (code & 15).to(tl.float32), (code >> 4).to(tl.float32)
        tl.store(out, (minimum + low * scale).to(kind), mask=live)
        tl.store(out + GROUP // 2, (minimum + high * scale).to(kind), mask=live)


@triton.jit
def _ends(x, within, LARGEST: tl.constexpr):
    """Least value, largest value and number of values beyond LARGEST, of [groups, values]."""
    low = tl.min(tl.where(within, x, float("inf")), axis=1)
    high = tl.max(tl.where(within, x, float("-inf")), axis=1)
    beyond = tl.sum((within & ~(tl.abs(x) <= LARGEST)).to(tl.int32), axis=1)
    return low, high, beyond


@triton.jit
def _code(x, minimum, scale, levels):
    """Codes of [groups, values], uint8."""
    steps = tl.div_rn(x - minimum[:, None], scale[:, None])
    steps = tl.minimum(tl.maximum(steps, 0.0), levels)
    # Adding 1.5 * 2**23 rounds to a whole number, ties to even, which is in the sum's low bits.
    return ((steps + 12582912.0).to(tl.int32, bitcast=True) & 255).to(tl.uint8)


@triton.jit(do_not_specialize=_COUNTS)
def _pack(
    values, packed, total, size, middle, n1, n2, n3, v0, v1, v2, v3, p0, p1, p2, p3,
    LARGEST: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    live = unit < total
    group, n, nbytes, place, start = _place(
        unit, size, n1, n2, n3, v0, v1, v2, v3, p0, p1, p2, p3, BITS, GROUP
    )
    levels: tl.constexpr = 2.0**BITS - 1
    i = tl.arange(0, GROUP * BITS // 8)[None, :]
    within = live[:, None] & (i < nbytes[:, None])
    also = live[:, None] & (i < (n - nbytes)[:, None])
    source = values + place[:, None] + i
    x = tl.load(source, mask=within, other=0.0).to(tl.float32)
    low, high, beyond = _ends(x, within, LARGEST)
    y = x
    if BITS == 4:
        y = tl.load(source + nbytes[:, None], mask=also, other=0.0).to(tl.float32)
        others = _ends(y, also, LARGEST)
        low, high = tl.minimum(low, others[0]), tl.maximum(high, others[1])
        beyond += others[2]
    # Added to zero, since -0.0 would be packed as another byte than 0.0.
    minimum = low.to(tl.float16).to(tl.float32) + 0.0
    span = tl.where(high > minimum, high - minimum, 0.0)
    scale = (span * (1 / levels)).to(tl.float16)
    short = (scale.to(tl.float32) * levels < span).to(tl.uint16)
    scale = (scale.to(tl.uint16, bitcast=True) + short).to(tl.float16, bitcast=True).to(tl.float32)
    valid = beyond == 0
    parameters = packed + start + middle + group * 4
    _store_half(parameters, tl.where(valid, minimum, float("nan")), live)
    _store_half(parameters + 2, tl.where(valid, scale, 0.0), live)
    divisor = tl.where(scale > 0, scale, 1.0)
    code = _code(x, minimum, divisor, levels)
    if BITS == 4:
        code |= tl.where(also, _code(y, minimum, divisor, levels) << 4, 0).to(tl.uint8)
    codes = packed + (start + group * (GROUP * BITS // 8))[:, None] + i
    tl.store(codes, tl.where(valid[:, None], code, 0).to(tl.uint8), mask=within)
    last = group * (GROUP * BITS // 8) + nbytes
    filled = live & (group == tl.cdiv(size, GROUP) - 1) & (last < middle)
    tl.store(packed + start + last, tl.zeros_like(last).to(tl.uint8), mask=filled)
