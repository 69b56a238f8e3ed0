"""Search for the minimum and scale of least squared error, for several groups at once.

Alternating least squares from several starts: fit the best line through given codes, then choose
the best codes on that line, and so on, which ends in a near optimum. Each group is a lane of
vectors, so every CPU adds in the same order. For use within numba functions. Knows no layout.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import types

from flexgen_ray.kernels.groups import (
    HALF_MAX,
    from_half,
    round_to_codes,
    round_to_half,
    to_half,
    value_at,
)
from flexgen_ray.kernels.vectors import (
    I64,
    ROUNDER,
    constant,
    element_at,
    emit_loop,
    emitted,
    load,
    splat,
    store,
)
from flexgen_ray.quant.packing import GROUP

LANES = 8  # groups that are searched together
# Widths that a search starts from, as shares of the group's range; lines tried from each start.
WIDTHS = (0.8, 0.85, 0.9, 0.95, 1.05)
TURNS = 4
# Rows of the state, one float32 for each group: its base (the minimum it had), the sum of its
# values less the base, the line to try (minimum and step), the best line so far, and its error.
BASE, TOTAL, LOW, STEP, BEST_LOW, BEST_STEP, LEAST = range(7)
STATE_ROWS = 7
_ROW_BYTES = 4 * LANES


def _number(value: float) -> ir.Constant:
    return constant(value, count=LANES)


def _sums_over_group(
    b: ir.IRBuilder,
    values: ir.Value,
    line: tuple[ir.Value, ir.Value, ir.Value],
    levels: ir.Value,
) -> list[ir.Value]:
    """Squared error, and sums of code, code**2 and code * value, over each group's values.

    line: its lowest value less the base, its step, and the step's inverse.
    """
    shift, step, inverse = line

    def add_value(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        y = load(b, types.float32, element_at(b, values, i, _ROW_BYTES), LANES)
        steps = round_to_codes(b, b.fmul(b.fsub(y, shift), inverse), levels)
        code = b.fsub(steps, _number(ROUNDER))
        miss = b.fsub(y, b.fadd(b.fmul(code, step), shift))
        terms = b.fmul(miss, miss), code, b.fmul(code, code), b.fmul(code, y)
        return [b.fadd(before, term) for before, term in zip(sums, terms, strict=True)]

    return emit_loop(b, I64(GROUP), 1, [_number(0.0)] * 4, add_value)


@emitted
def try_lines(context, values, state, levels):
    """Try each group's line, keep it if it is the best so far, and fit the next to its codes.

    values: address of float32 [GROUP, LANES], less the base; state: of float32 [STATE_ROWS, LANES];
    levels: the highest code. A line that leaves the range of float16 is not kept.
    """

    def generate(context, b, signature, args):
        values, state, levels = args
        levels = splat(b, levels, LANES)

        def place(index):
            return b.add(state, I64(index * _ROW_BYTES))

        base, total, low, step, best_low, best_step, least = (
            load(b, types.float32, place(index), LANES) for index in range(STATE_ROWS)
        )
        line = b.fsub(low, base), step, b.fdiv(_number(1.0), step)
        error, c, cc, cy = _sums_over_group(b, values, line, levels)
        # Is the line the best so far?
        high = b.fadd(low, b.fmul(levels, step))
        within = b.and_(
            b.fcmp_ordered(">=", low, _number(-HALF_MAX)),
            b.fcmp_ordered("<=", high, _number(HALF_MAX)),
        )
        is_line = b.and_(within, b.fcmp_ordered(">", step, _number(0.0)))
        is_best = b.and_(is_line, b.fcmp_ordered("<", error, least))
        pairs = ((BEST_LOW, low, best_low), (BEST_STEP, step, best_step), (LEAST, error, least))
        for index, new, best in pairs:
            store(b, b.select(is_best, new, best), place(index))
        # The next line is the regression of the values on their codes, rounded to float16.
        count = _number(float(GROUP))
        spread = b.fsub(b.fmul(count, cc), b.fmul(c, c))
        slope = b.fdiv(b.fsub(b.fmul(count, cy), b.fmul(c, total)), spread)
        mean = b.fdiv(b.fsub(total, b.fmul(slope, c)), count)
        next_low = round_to_half(b, b.fadd(base, mean))
        rest = b.fsub(cy, b.fmul(b.fsub(next_low, base), c))
        next_step = round_to_half(b, b.fdiv(rest, cc))
        goes_on = b.and_(is_line, b.fcmp_ordered(">", spread, _number(0.0)))
        store(b, b.select(goes_on, next_low, low), place(LOW))
        store(b, b.select(goes_on, next_step, step), place(STEP))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@numba.njit(nogil=True)
def rounded(value):
    """Float32 rounded to float16 and added to zero, since -0.0 has other bytes than 0.0."""
    return from_half(to_half(np.float32(value))) + np.float32(0)


@numba.njit(nogil=True)
def search(kind, values, count, nbytes, levels, ends, lines, transposed, state):
    """Replace the lines of `count` whole groups, side by side at an address, by better ones.

    kind, nbytes: type and bytes of a value; levels: the highest code.
    ends: float32 [2, LANES], each group's least and largest values.
    lines: float32 [2, LANES], minimum and scale, replaced where others have less squared error.
    transposed, state: workspace, float32 [GROUP, LANES] and [STATE_ROWS, LANES].
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
