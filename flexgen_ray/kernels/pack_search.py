"""A search for the minimum and scale of least squared error, of many groups at once.

Alternating least squares from several starts: the best line through given codes, then the best
codes on that line, which finds a near optimum only. Each group is a lane of vectors, so every CPU
adds in the same order. For use within numba functions.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.core import cgutils, types

from flexgen_ray.kernels.groups import (
    F32,
    HALF_MAX,
    ROUNDER,
    codes_above,
    constant,
    emitted,
    from_half,
    load,
    round_to_half,
    splat,
    store,
    to_half,
    value_at,
)
from flexgen_ray.quant.packing import GROUP

LANES = 8  # groups that are searched together
# Of a group's range, where the search begins; and how many lines it tries from there.
WIDTHS = (0.8, 0.85, 0.9, 0.95, 1.05)
TURNS = 4
# Rows of the state, LANES float32 each: the groups' base (the minimum they had), the sum of their
# values less that, the line to be tried, and the best line so far with its squared error.
BASE, TOTAL, LOW, STEP, BEST_LOW, BEST_STEP, LEAST = range(7)
STATE_ROWS = 7


@emitted
def try_lines(context, values, state, levels):
    """Try each group's line, keep it if it's the best so far, and make the next of its codes.

    values: address of float32 [GROUP, LANES], less the base; state: of float32 [STATE_ROWS, LANES].
    A line that leaves float16 is not kept.
    """

    def generate(context, b, signature, args):
        values, state, levels = args
        levels = splat(b, levels, LANES)
        row = 4 * LANES

        def number(value):
            return constant(F32, value, LANES)

        def place(index):
            return b.add(state, state.type(index * row))

        base, total, low, step, best_low, best_step, least = (
            load(b, F32, place(index), LANES) for index in range(STATE_ROWS)
        )
        shift, inverse = b.fsub(low, base), b.fdiv(number(1.0), step)
        sums = [cgutils.alloca_once_value(b, number(0.0)) for _ in range(4)]
        with cgutils.for_range(b, values.type(GROUP)) as loop:
            y = load(b, F32, b.add(values, b.mul(loop.index, values.type(row))), LANES)
            steps = codes_above(b, b.fmul(b.fsub(y, shift), inverse), levels)
            code = b.fsub(steps, number(ROUNDER))
            miss = b.fsub(y, b.fadd(b.fmul(code, step), shift))
            terms = b.fmul(miss, miss), code, b.fmul(code, code), b.fmul(code, y)
            for place_of, term in zip(sums, terms, strict=True):
                b.store(b.fadd(b.load(place_of), term), place_of)
        error, c, cc, cy = map(b.load, sums)
        high = b.fadd(low, b.fmul(levels, step))
        within = b.and_(
            b.fcmp_ordered(">=", low, number(-HALF_MAX)),
            b.fcmp_ordered("<=", high, number(HALF_MAX)),
        )
        is_line = b.and_(within, b.fcmp_ordered(">", step, number(0.0)))
        is_best = b.and_(is_line, b.fcmp_ordered("<", error, least))
        pairs = ((BEST_LOW, low, best_low), (BEST_STEP, step, best_step), (LEAST, error, least))
        for index, found, kept in pairs:
            store(b, b.select(is_best, found, kept), place(index))
        count = number(float(GROUP))
        spread = b.fsub(b.fmul(count, cc), b.fmul(c, c))
        slope = b.fdiv(b.fsub(b.fmul(count, cy), b.fmul(c, total)), spread)
        mean = b.fdiv(b.fsub(total, b.fmul(slope, c)), count)
        next_low = round_to_half(b, b.fadd(base, mean))
        rest = b.fsub(cy, b.fmul(b.fsub(next_low, base), c))
        next_step = round_to_half(b, b.fdiv(rest, cc))
        goes_on = b.and_(is_line, b.fcmp_ordered(">", spread, number(0.0)))
        store(b, b.select(goes_on, next_low, low), place(LOW))
        store(b, b.select(goes_on, next_step, step), place(STEP))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@numba.njit(nogil=True)
def rounded(value):
    """As float16 holds it; added to zero, since -0.0 would be packed as another byte than 0.0."""
    return from_half(to_half(np.float32(value))) + np.float32(0)


@numba.njit(nogil=True)
def search(kind, values, count, nbytes, levels, ends, lines, transposed, state):
    """Better lines for `count` whole groups that lie one after the other at an address.

    ends: float32 [2, LANES], their least and largest values; lines: float32 [2, LANES], minimum
    and scale, which are replaced if others have less squared error; transposed, state: float32
    [GROUP, LANES] and [STATE_ROWS, LANES], to work in.
    """
    places = transposed.ctypes.data, state.ctypes.data
    for group in range(count):
        base, total = lines[0, group], np.float32(0)
        for i in range(GROUP):
            y = value_at(kind, values + (group * GROUP + i) * nbytes) - base
            transposed[i, group] = y
            total += y
        state[BASE, group], state[TOTAL, group], state[LEAST, group] = base, total, np.inf
        state[LOW, group], state[STEP, group] = base, lines[1, group]
        state[BEST_LOW, group], state[BEST_STEP, group] = base, lines[1, group]
    for start in range(len(WIDTHS) + 1):
        for group in range(count if start else 0):
            middle = (ends[0, group] + ends[1, group]) / 2
            width = (ends[1, group] - ends[0, group]) * WIDTHS[start - 1]
            state[LOW, group] = rounded(middle - width / 2)
            state[STEP, group] = rounded(width / levels)
        for _ in range(TURNS):
            try_lines(places[0], places[1], levels)
    for group in range(count):
        if lines[1, group] > 0:
            lines[0, group], lines[1, group] = state[BEST_LOW, group], state[BEST_STEP, group]
