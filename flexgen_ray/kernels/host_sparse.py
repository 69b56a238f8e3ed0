"""Selection of the tokens that sparse host attention keeps: for use within numba functions.

Selects the same tokens as attention.select_tokens. Knows scores; neither keys nor values.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types

from flexgen_ray.kernels.host_tiles import BLOCK, TILES, reduce_per_head
from flexgen_ray.kernels.vectors import (
    F32,
    I32,
    I32_VECTOR,
    I64,
    LANES,
    VECTOR_BYTES,
    ZEROS,
    constant,
    element_at,
    emit_loop,
    emit_switch,
    emitted,
    exp2,
    floats_at,
    load,
    maximum,
    splat,
    store,
    sum_neighbours,
)


@emitted
def add_softmax(context, heads, tokens, scores, weights):
    """weights[:tokens] += the softmax of scores[tokens, heads], summed over a tile's heads.

    Scores are exponents of two. Both arrays have room for whole vectors of tokens.
    """

    def generate(context, b, signature, args):
        heads, tokens, scores, weights = args

        def emit(heads):
            valid = b.mul(tokens, I64(heads))
            end = b.mul(b.udiv(b.add(tokens, I64(LANES - 1)), I64(LANES)), I64(LANES * heads))

            def clear(i, _):
                place = element_at(b, scores, b.add(valid, i), 4)
                store(b, ir.Constant(F32, -math.inf), place)
                return []

            def score(i):
                return load(b, types.float32, element_at(b, scores, i, 4))

            def power(i):
                return exp2(b, b.fsub(score(i), largest))

            def share(first, _):
                places = [b.add(first, I64(n * LANES)) for n in range(heads)]
                shares = [b.fdiv(power(place), total) for place in places]
                target = element_at(b, weights, b.udiv(first, I64(heads)), 4)
                shares = sum_neighbours(b, shares)
                store(b, b.fadd(load(b, types.float32, target), shares), target)
                return []

            emit_loop(b, b.sub(end, valid), 1, [], clear)
            lowest = constant(-math.inf)
            larger = emit_loop(b, end, LANES, [lowest], lambda i, x: [maximum(b, score(i), x[0])])
            largest = reduce_per_head(b, heads, larger, maximum)
            added = emit_loop(b, end, LANES, [ZEROS], lambda i, x: [b.fadd(x[0], power(i))])
            total = reduce_per_head(b, heads, added, ir.IRBuilder.fadd)
            emit_loop(b, end, LANES * heads, [], share)

        emit_switch(b, heads, TILES, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@numba.njit(nogil=True)
def keep_largest(weights, tokens, count, selected):
    """selected[:n] = positions of the count largest of the tokens' weights, in order.

    Equal weights are selected from the first on. Weights are not negative, so their bits, as
    integers, are in the order of their values. weights has room for whole blocks,
    and selected for one more than count. Returns n, which is the count, or less if weights are NaN.
    """
    weights[tokens:] = -1
    bits = weights.view(np.int32)
    least, last = _find_threshold(weights.ctypes.data, -(-tokens // BLOCK), count, bits)
    n = 0
    for i in range(tokens):
        # Stored in any case: a branch could not be predicted.
        selected[n] = i
        n += (bits[i] > least) | ((bits[i] == least) & (i <= last))
    return n


@numba.njit(nogil=True)
def _find_threshold(address, blocks, count, bits):
    """Bits of the least selected weight, and the last position at which that weight is selected.

    Halves the range of all float32 bits until `count` weights are no smaller than the middle. If
    equal weights prevent that, only the first of them are selected.
    """
    low, high = np.int64(0), np.int64(2**31 - 1)
    ties = count
    while high - low > 1:
        middle = (low + high) // 2
        at_least = _count_at_least(address, blocks, middle)
        if at_least == count:
            return middle, len(bits)
        if at_least > count:
            low = middle
        else:
            high, ties = middle, count - at_least
    last = -1
    while ties > 0 and last + 1 < len(bits):
        last += 1
        ties -= bits[last] == low
    return low, last


@emitted
def _count_at_least(context, address, blocks, least):
    """Number of int32 in some blocks, at an address, that are no smaller than `least`."""

    def generate(context, b, signature, args):
        address, blocks, least = args
        bound = splat(b, b.trunc(least, I32))

        def step(i, counts):
            counted = []
            for n, before in enumerate(counts):
                place = element_at(b, address, b.add(i, I64(n * LANES)), 4)
                bits = b.bitcast(load(b, types.float32, place), I32_VECTOR)
                one = b.select(b.icmp_signed(">=", bits, bound), constant(1.0), ZEROS)
                counted.append(b.fadd(before, one))
            return counted

        # Counts below 2**24 are exact in float32.
        counts = emit_loop(b, b.mul(blocks, I64(BLOCK)), BLOCK, [ZEROS] * (BLOCK // LANES), step)
        total = reduce_per_head(b, 1, counts, ir.IRBuilder.fadd)
        return b.fptosi(b.extract_element(total, I32(0)), I64)

    return types.int64(*[types.int64] * 3), generate


@numba.njit(nogil=True)
def gather_scores(scores, heads, selected, into):
    """Copy a tile's scores of the selected tokens to an address, side by side."""
    block = carray(floats_at(into), len(selected) * heads)
    for j in range(len(selected)):
        for i in range(heads):
            block[j * heads + i] = scores[selected[j] * heads + i]


@emitted
def copy_vectors(context, address, vectors, into):
    """Copy a number of vectors from one address to another."""

    def generate(context, b, signature, args):
        address, vectors, into = args

        def one(i, _):
            place, target = (element_at(b, start, i, VECTOR_BYTES) for start in (address, into))
            store(b, load(b, types.float32, place), target)
            return []

        emit_loop(b, vectors, 1, [], one)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
