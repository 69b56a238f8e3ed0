"""Quantization of vectors on the CPU, near the speed of its memory; bit for bit as pack_plain.

Only which NaN stands for a value that can't be quantized may differ. Each vector is the work of
one thread, of as many as torch has. Knows addresses of vectors; no tiers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numba
import numpy as np
from torch import Tensor

from flexgen_ray.kernels.groups import (
    RUN,
    dequantize_one,
    dequantize_run,
    extremes,
    from_half,
    quantize_one,
    quantize_run,
    store_halves,
    to_half,
    value_at,
)
from flexgen_ray.kernels.pack_search import LANES, STATE_ROWS, rounded, search
from flexgen_ray.kernels.threads import on_threads
from flexgen_ray.kernels.vectors import KINDS, compiled
from flexgen_ray.quant.packing import GROUP, LARGEST, PARAMETER_BYTES, code_bytes

# Least work of a thread: far more than it costs to start one.
_VALUES_PER_THREAD = 1 << 20


def pack(x: Tensor, bits: int, out: Tensor, least_squares: bool = False) -> bool:
    """Quantize vectors; False if a group holds a value beyond LARGEST, and so becomes NaN."""
    return all(_run(_pack, x, out, (bits, x.shape[-1], least_squares)))


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """Dequantize vectors into out, rounded to its dtype."""
    _run(_unpack, out, packed, (bits, out.shape[-1]))


def _run(kernel: Callable, values: Tensor, packed: Tensor, task: tuple) -> list:
    """Run the kernel on each thread's share of the vectors; returns each one's result."""
    kind = KINDS[str(values.dtype).removeprefix("torch.")]
    places = _addresses(values), _addresses(packed)
    bits, size = task[:2]
    strides = values.element_size(), code_bytes(size, bits)
    count = len(places[0])
    work = partial(kernel, kind, task, strides, places)
    return on_threads(work, count, min(count * size // _VALUES_PER_THREAD, count))


def _addresses(x: Tensor) -> np.ndarray:
    """Addresses of x's vectors, in order."""
    places = np.array(x.data_ptr())
    for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        places = np.add.outer(places, np.arange(length) * (stride * x.element_size()))
    return places.reshape(-1)


@numba.njit(nogil=True)
def _dequantize(kind, count, codes, shift, mask, parameters, out, nbytes):
    """Write count values, of nbytes each, from as many bytes of codes."""
    i = 0
    while i + RUN <= count:
        dequantize_run(kind, codes + i, shift, mask, parameters, out + i * nbytes)
        i += RUN
    while i < count:
        dequantize_one(kind, codes + i, shift, mask, parameters, out + i * nbytes)
        i += 1


@compiled
def _unpack(kind, task, strides, places, first, end):
    """Dequantize the vectors from first to before end.

    task: (bits, values of a vector); strides: bytes of a value, and of a vector's codes; places:
    addresses of each vector's (values, packed bytes).
    """
    (bits, size), (nbytes, middle) = task, strides
    none, four, low, whole = np.uint8(0), np.uint8(4), np.uint8(15), np.uint8(255)
    for vector in range(first, end):
        out, codes = places[0][vector], places[1][vector]
        parameters = codes + middle
        for start in range(0, size, GROUP):
            n = min(GROUP, size - start)
            if bits == 8:
                _dequantize(kind, n, codes, none, whole, parameters, out, nbytes)
                codes += n
            else:
                half = (n + 1) // 2
                _dequantize(kind, half, codes, none, low, parameters, out, nbytes)
                _dequantize(
                    kind, n - half, codes, four, low, parameters, out + half * nbytes, nbytes
                )
                codes += half
            out += n * nbytes
            parameters += PARAMETER_BYTES


@numba.njit(nogil=True)
def _ends(kind, values, n, nbytes):
    """(least, largest) of a group's n values; NaN if one of them isn't finite."""
    if n == GROUP:
        return extremes(kind, values)
    low, high, zero_or_nan = value_at(kind, values), value_at(kind, values), np.float32(0)
    for i in range(n):
        value = value_at(kind, values + i * nbytes)
        low, high = min(low, value), max(high, value)
        zero_or_nan += value * np.float32(0)
    return low + zero_or_nan, high + zero_or_nan


@numba.njit(nogil=True)
def _covering(span, levels):
    """Bits of the smallest float16 scale with which the highest code reaches the span."""
    if not span > 0:
        return np.uint16(0)
    scale = to_half(span * (np.float32(1) / levels))
    return np.uint16(scale + (from_half(scale) * levels < span))


@numba.njit(nogil=True)
def _quantize(kind, n, values, grid, codes, bits, nbytes):
    """Write the codes of a group's n values; returns the address after them."""
    count = n if bits == 8 else n // 2
    ahead = 0 if bits == 8 else (n + 1) // 2 * nbytes
    i = 0
    while i + RUN <= count:
        place = values + i * nbytes
        quantize_run(kind, place, place + ahead if ahead else 0, grid, codes + i)
        i += RUN
    while i < count:
        place = values + i * nbytes
        quantize_one(kind, place, place + ahead if ahead else 0, grid, codes + i)
        i += 1
    if bits == 4 and n % 2:
        quantize_one(kind, values + i * nbytes, 0, grid, codes + i)
        i += 1
    return codes + i


@numba.njit(nogil=True)
def _ranges(kind, values, size, nbytes, levels, ends, lines):
    """Fill in extremes (ends), minimum and scale (lines) of up to LANES groups.

    Minimum and scale are NaN and 0 where a value is beyond LARGEST. Returns the number of groups,
    and whether no value is beyond it.
    """
    count, valid = 0, True
    for start in range(0, min(size, LANES * GROUP), GROUP):
        low, high = _ends(kind, values + start * nbytes, min(GROUP, size - start), nbytes)
        if -LARGEST <= low and high <= LARGEST:
            minimum = rounded(low)
            scale = from_half(_covering(high - minimum, levels))
        else:
            valid, minimum, scale = False, np.float32(np.nan), np.float32(0)
        ends[0, count], ends[1, count] = low, high
        lines[0, count], lines[1, count] = minimum, scale
        count += 1
    return count, valid


@compiled
def _pack(kind, task, strides, places, first, end):
    """Quantize the vectors from first to before end; False if a value is beyond LARGEST.

    Arguments as for _unpack; task has a third entry, whether to search for least squares.
    """
    (bits, size, least_squares), (nbytes, middle) = task, strides
    top, zero, one = np.float32(2**bits - 1), np.float32(0), np.float32(1)
    ends, lines = np.zeros((2, LANES), np.float32), np.zeros((2, LANES), np.float32)
    transposed = np.zeros((GROUP, LANES), np.float32)
    state = np.zeros((STATE_ROWS, LANES), np.float32)
    all_valid = True
    for vector in range(first, end):
        values, codes = places[0][vector], places[1][vector]
        parameters = codes + middle
        for start in range(0, size, LANES * GROUP):
            left = size - start
            count, valid = _ranges(kind, values, left, nbytes, top, ends, lines)
            all_valid = all_valid and valid
            if least_squares:
                whole = min(count, left // GROUP)
                search(kind, values, whole, nbytes, top, ends, lines, transposed, state)
            for group in range(count):
                n = min(GROUP, left - group * GROUP)
                minimum, scale = lines[0, group], lines[1, group]
                store_halves(to_half(minimum), to_half(scale), parameters)
                grid = (minimum, scale if scale > 0 else one, top)
                codes = _quantize(kind, n, values, grid, codes, bits, nbytes)
                values += n * nbytes
                parameters += PARAMETER_BYTES
        if codes < places[1][vector] + middle:  # the byte that makes their number even is zero
            quantize_one(kind, places[0][vector], 0, (zero, one, zero), codes)
    return all_valid
