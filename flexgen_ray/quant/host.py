"""Packing and unpacking on the CPU, near the speed of its memory; bit for bit as plain.py.

(Which NaN stands for what can't be packed is not said.) Each vector is the work of one thread, of
as many as torch has. Knows addresses of vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from flexgen_ray.quant.compiled import compiled
from flexgen_ray.quant.host_groups import (
    KINDS,
    RUN,
    extremes,
    from_half,
    spread_one,
    spread_run,
    squeeze_one,
    squeeze_run,
    store_halves,
    sums_on_grid,
    to_half,
    value_at,
)
from flexgen_ray.quant.packing import GROUP, LARGEST, PARAMETER_BYTES, code_bytes

# numba's cache heeds changes of this file only, so it names the state of those that it compiles
# with it: host_groups and packing (a test says).
_PARTS = "dcebc6b4"

# A thread's least work: far more than it costs to start one.
_VALUES_PER_THREAD = 1 << 20
_HALF_MAX = 65504.0
# Of a group's range, where a search for the least squared error begins; and how far it goes.
_WIDTHS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)
_TURNS = 4


def pack(x: Tensor, bits: int, out: Tensor, least_squares: bool = False) -> bool:
    """Whether all could be packed: groups become NaN which hold something beyond LARGEST."""
    return all(_on_threads(_pack, x, out, (bits, x.shape[-1], least_squares)))


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    _on_threads(_unpack, out, packed, (bits, out.shape[-1]))


def _on_threads(kernel: Callable, values: Tensor, packed: Tensor, task: tuple) -> list:
    """What the kernel returns for each thread's share of the vectors."""
    kind = KINDS[str(values.dtype).removeprefix("torch.")]
    places = _addresses(values), _addresses(packed)
    bits, size = task[:2]
    strides = values.element_size(), code_bytes(size, bits)
    count = len(places[0])
    threads = max(1, min(torch.get_num_threads(), count * size // _VALUES_PER_THREAD, count))
    ends = [count * i // threads for i in range(threads + 1)]
    shares = [
        (kind, task, strides, places, first, end)
        for first, end in zip(ends, ends[1:], strict=False)
    ]
    if threads == 1:
        return [kernel(*shares[0])]
    with ThreadPoolExecutor(threads - 1, "quant") as pool:
        others = [pool.submit(kernel, *share) for share in shares[1:]]
        return [kernel(*shares[0]), *(other.result() for other in others)]


def _addresses(x: Tensor) -> np.ndarray:
    """Of x's vectors, in order."""
    places = np.array(x.data_ptr())
    for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        places = np.add.outer(places, np.arange(length) * (stride * x.element_size()))
    return places.reshape(-1)


@numba.njit(nogil=True)
def _spread(kind, count, codes, shift, mask, parameters, out, nbytes):
    """count values, of nbytes each, from as many bytes."""
    i = 0
    while i + RUN <= count:
        spread_run(kind, codes + i, shift, mask, parameters, out + i * nbytes)
        i += RUN
    while i < count:
        spread_one(kind, codes + i, shift, mask, parameters, out + i * nbytes)
        i += 1


@compiled
def _unpack(kind, task, strides, places, first, end):
    """Vectors from the first to before the end; strides: bytes of a value, of a vector's codes;
    places: (values, packed)."""
    (bits, size), (nbytes, middle) = task, strides
    none, four, low, whole = np.uint8(0), np.uint8(4), np.uint8(15), np.uint8(255)
    for vector in range(first, end):
        out, codes = places[0][vector], places[1][vector]
        parameters = codes + middle
        for start in range(0, size, GROUP):
            n = min(GROUP, size - start)
            if bits == 8:
                _spread(kind, n, codes, none, whole, parameters, out, nbytes)
                codes += n
            else:
                half = (n + 1) // 2
                _spread(kind, half, codes, none, low, parameters, out, nbytes)
                _spread(kind, n - half, codes, four, low, parameters, out + half * nbytes, nbytes)
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
    """The bits of the smallest float16 with which the highest code reaches the span."""
    if not span > 0:
        return np.uint16(0)
    scale = to_half(span * (np.float32(1) / levels))
    return np.uint16(scale + (from_half(scale) * levels < span))


@numba.njit(nogil=True)
def _squeeze(kind, n, values, grid, codes, bits, nbytes):
    """The codes of n values, as a group has them; returns the address after them."""
    count = n if bits == 8 else n // 2
    ahead = 0 if bits == 8 else (n + 1) // 2 * nbytes
    i = 0
    while i + RUN <= count:
        place = values + i * nbytes
        squeeze_run(kind, place, place + ahead if ahead else 0, grid, codes + i)
        i += RUN
    while i < count:
        place = values + i * nbytes
        squeeze_one(kind, place, place + ahead if ahead else 0, grid, codes + i)
        i += 1
    if bits == 4 and n % 2:
        squeeze_one(kind, values + i * nbytes, 0, grid, codes + i)
        i += 1
    return codes + i


@numba.njit(nogil=True)
def _rounded(minimum):
    """As float16 holds it; added to zero, since -0.0 would be packed as another byte than 0.0."""
    return from_half(to_half(np.float32(minimum))) + np.float32(0)


@numba.njit(nogil=True)
def _fitted(kind, values, ends, levels, minimum, scale):
    """(minimum, scale) of a whole group with less squared error, if one is found.

    From several widths of the range, by turns: the best line through given codes, the best codes
    on the line (alternating least squares, which finds a near optimum only).
    """
    base, middle, width = minimum, (ends[0] + ends[1]) / 2, ends[1] - ends[0]
    least = sums_on_grid(kind, values, base, (np.float32(0), scale, levels))[0]
    for part in _WIDTHS:
        low = _rounded(middle - width * part / 2)
        step = from_half(to_half(np.float32(width * part / levels)))
        for _ in range(_TURNS):
            if not (step > 0 and -_HALF_MAX <= low and low + levels * step <= _HALF_MAX):
                break
            grid = low - base, step, levels
            error, y, c, cc, cy = sums_on_grid(kind, values, base, grid)
            if error < least:
                least, minimum, scale = error, low, step
            spread = GROUP * cc - c * c
            if not spread > 0:
                break
            slope = (GROUP * cy - c * y) / spread
            low = _rounded(base + (y - slope * c) / GROUP)
            step = from_half(to_half(np.float32((cy - (low - base) * c) / cc)))
    return minimum, scale


@numba.njit(nogil=True)
def _range(kind, values, n, nbytes, levels, least_squares):
    """A group's minimum and scale; NaN and 0 if there is a value beyond LARGEST."""
    low, high = _ends(kind, values, n, nbytes)
    if not (-LARGEST <= low and high <= LARGEST):
        return np.float32(np.nan), np.float32(0)
    minimum = _rounded(low)
    scale = from_half(_covering(high - minimum, levels))
    if least_squares and n == GROUP and scale > 0:
        return _fitted(kind, values, (low, high), levels, minimum, scale)
    return minimum, scale


@compiled
def _pack(kind, task, strides, places, first, end):
    """As _unpack; whether all values are within LARGEST."""
    (bits, size, least_squares), (nbytes, middle) = task, strides
    top, zero, one = np.float32(2**bits - 1), np.float32(0), np.float32(1)
    valid = True
    for vector in range(first, end):
        values, codes = places[0][vector], places[1][vector]
        parameters = codes + middle
        for start in range(0, size, GROUP):
            n = min(GROUP, size - start)
            minimum, scale = _range(kind, values, n, nbytes, top, least_squares)
            valid = bool(valid and not np.isnan(minimum))
            store_halves(to_half(minimum), to_half(scale), parameters)
            grid = (minimum, scale if scale > 0 else one, top)
            codes = _squeeze(kind, n, values, grid, codes, bits, nbytes)
            values += n * nbytes
            parameters += PARAMETER_BYTES
        if codes < places[1][vector] + middle:  # a byte that makes them even is zero
            squeeze_one(kind, places[0][vector], 0, (zero, one, zero), codes)
    return valid
