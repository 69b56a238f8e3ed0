"""Which tokens sparse host attention keeps: for use within numba functions.

attention.decode_sparse says which these are. Knows scores; neither keys nor values.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types

from flexgen_ray.kernels.host_tiles import BLOCK, TILES, across
from flexgen_ray.kernels.vectors import (
    F32,
    I32,
    I32_VECTOR,
    I64,
    LANES,
    VECTOR_BYTES,
    ZEROS,
    constant,
    emit_loop,
    emit_switch,
    emitted,
    exp2,
    load,
    maximum,
    plus,
    splat,
    store,
    sums_of_neighbours,
)


@emitted
def weigh(context, heads, tokens, scores, weights):
    """weights[:tokens] += the sums over a tile's heads of the softmax of scores[tokens, heads].

    Scores are powers of two. There is room for whole vectors of tokens, here and there.
    """

    def generate(context, b, signature, args):
        heads, tokens, scores, weights = args

        def emit(heads):
            valid = b.mul(tokens, I64(heads))
            end = b.mul(b.udiv(b.add(tokens, I64(LANES - 1)), I64(LANES)), I64(LANES * heads))

            def clear(i, _):
                place = plus(b, scores, b.add(valid, i), 4)
                store(b, ir.Constant(F32, -math.inf), place)
                return []

            def score(i):
                return load(b, types.float32, plus(b, scores, i, 4))

            def power(i):
                return exp2(b, b.fsub(score(i), largest))

            def share(first, _):
                places = [b.add(first, I64(n * LANES)) for n in range(heads)]
                shares = [b.fdiv(power(place), total) for place in places]
                target = plus(b, weights, b.udiv(first, I64(heads)), 4)
                found = sums_of_neighbours(b, shares)
                store(b, b.fadd(load(b, types.float32, target), found), target)
                return []

            emit_loop(b, b.sub(end, valid), 1, [], clear)
            lowest = constant(-math.inf)
            found = emit_loop(b, end, LANES, [lowest], lambda i, x: [maximum(b, score(i), x[0])])
            largest = across(b, heads, found, maximum)
            added = emit_loop(b, end, LANES, [ZEROS], lambda i, x: [b.fadd(x[0], power(i))])
            total = across(b, heads, added, ir.IRBuilder.fadd)
            emit_loop(b, end, LANES * heads, [], share)

        emit_switch(b, heads, TILES, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@numba.njit(nogil=True)
def keep(weights, tokens, count, kept):
    """kept[:n] = the positions of the count largest of the tokens' weights, in order; of equal
    ones the first.

    Weights are not negative, so their bits are in the order of their values; there is room for
    whole blocks of them, and in kept for one more. Returns n, which is the count, or less if
    there are weights that are not numbers.
    """
    weights[tokens:] = -1
    bits = weights.view(np.int32)
    least, last = _least_kept(weights.ctypes.data, -(-tokens // BLOCK), count, bits)
    n = 0
    for i in range(tokens):
        # Stored in any case: which tokens are kept can't be foretold, as a branch would have to.
        kept[n] = i
        n += (bits[i] > least) | ((bits[i] == least) & (i <= last))
    return n


@numba.njit(nogil=True)
def _least_kept(address, blocks, count, bits):
    """Of the kept weights' bits the least, and the last position where these are kept."""
    low, high = np.int64(0), np.int64(2**31 - 1)
    ties = count
    while high - low > 1:
        middle = (low + high) // 2
        found = _number_from(address, blocks, middle)
        if found == count:
            return middle, len(bits)
        if found > count:
            low = middle
        else:
            high, ties = middle, count - found
    last = -1
    while ties > 0 and last + 1 < len(bits):
        last += 1
        ties -= bits[last] == low
    return low, last


@emitted
def _number_from(context, address, blocks, least):
    """How many of the int32 in so many blocks are not below the least."""

    def generate(context, b, signature, args):
        address, blocks, least = args
        bound = splat(b, b.trunc(least, I32))

        def step(i, found):
            counted = []
            for n, before in enumerate(found):
                place = plus(b, address, b.add(i, I64(n * LANES)), 4)
                bits = b.bitcast(load(b, types.float32, place), I32_VECTOR)
                one = b.select(b.icmp_signed(">=", bits, bound), constant(1.0), ZEROS)
                counted.append(b.fadd(before, one))
            return counted

        # Terms below 2**24 are exact in float32.
        found = emit_loop(b, b.mul(blocks, I64(BLOCK)), BLOCK, [ZEROS] * (BLOCK // LANES), step)
        total = across(b, 1, found, ir.IRBuilder.fadd)
        return b.fptosi(b.extract_element(total, I32(0)), I64)

    return types.int64(*[types.int64] * 3), generate


@numba.njit(nogil=True)
def gather(scores, heads, kept, into):
    """A tile's scores of the kept tokens; into: an address."""
    block = carray(_floats_at(into), len(kept) * heads)
    for j in range(len(kept)):
        for i in range(heads):
            block[j * heads + i] = scores[kept[j] * heads + i]


@emitted
def move(context, address, vectors, into):
    """So many vectors from one address to another."""

    def generate(context, b, signature, args):
        address, vectors, into = args

        def one(i, _):
            place, target = (plus(b, start, i, VECTOR_BYTES) for start in (address, into))
            store(b, load(b, types.float32, place), target)
            return []

        emit_loop(b, vectors, 1, [], one)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@emitted
def _floats_at(context, address):
    def generate(context, b, signature, args):
        return b.inttoptr(args[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate
