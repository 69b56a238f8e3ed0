"""Scores of host attention's tiles (host_tiles has their layout): for use within numba functions.

Several heads share each key they load, so the processor's arithmetic binds; one head waits for
memory. Each case has its own loop.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from flexgen_ray.kernels.host_rows import emit_vectors, parameters, read
from flexgen_ray.kernels.host_tiles import LINE, TILES, part_of_row, vectors_of_queries
from flexgen_ray.kernels.vectors import (
    I64,
    LANES,
    MATRIX,
    VECTOR_BYTES,
    ZEROS,
    Values,
    emit_loop,
    emit_switch,
    emitted,
    fma,
    load,
    plus,
    prefetch,
    row_at,
    smaller,
    store,
    sums_of_neighbours,
    vector_bytes,
)
from flexgen_ray.quant.packing import GROUP

# Lengths of a row for which one head has a loop of its own.
_COMMON_DIMS = (64, 128)


@emitted
def score(context, kind, heads, shape, queries, rows, scores, ahead):
    """scores[j, h] = rows[j] . queries[h], for two or more heads; shape: (rows, bytes of one).

    A part of a row is repeated in a vector, for each head in a vector of queries, and multiplied
    with several of these. ahead: a matrix of the rows that are read soon; heads compute for so
    long that memory would idle, so they prefetch these.
    """

    def generate(context, b, signature, args):
        _, heads, shape, queries, rows, scores, ahead = args
        count, nbytes = (b.extract_value(shape, i) for i in range(2))
        last_row = b.sub(count, I64(1))

        def emit(heads):
            part, several = part_of_row(kind, heads), vectors_of_queries(kind, heads)
            at_once = LANES // several

            def some_rows(first, _):
                index = [smaller(b, b.add(first, I64(j)), last_row) for j in range(at_once)]
                taken = [row_at(b, rows, i) for i in index]

                def step(d, at, groups, sums):
                    _prefetch_some(b, kind, ahead, first, at_once, d)
                    place = plus(b, queries, d, 4 * heads)
                    vectors = [b.add(row, at) for row in taken]
                    return _multiply(b, kind, heads, place, (vectors, groups), sums)

                sums = emit_vectors(b, kind, taken, nbytes, [ZEROS] * LANES, step)
                place = plus(b, scores, first, 4 * heads)
                for i in range(0, LANES, part):
                    found = sums_of_neighbours(b, sums[i : i + part])
                    store(b, found, b.add(place, I64(i // several * heads * 4)))
                return []

            emit_loop(b, count, at_once, [], some_rows)

        emit_switch(b, heads, TILES[:-1], emit)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(kind, integer, MATRIX, integer, MATRIX, integer, MATRIX), generate


def _multiply(
    b: ir.IRBuilder,
    kind: types.Type,
    heads: int,
    queries: ir.Value,
    rows: tuple[Values, list[Values]],
    sums: Values,
) -> Values:
    """sums[row, vector of queries], with the products of LANES elements added.

    rows: the address of each one's vector, and its parameters.
    """
    part, several, sums = part_of_row(kind, heads), vectors_of_queries(kind, heads), list(sums)
    for i in range(LANES // part):
        places = [b.add(queries, I64((i * several + n) * VECTOR_BYTES)) for n in range(several)]
        q = [load(b, types.float32, place) for place in places]
        for j, (vector, group) in enumerate(zip(*rows, strict=True)):
            k = read(b, kind, vector, group, part, i)
            for n in range(several):
                sums[j * several + n] = fma(b, q[n], k, sums[j * several + n])
    return sums


def _prefetch_some(
    b: ir.IRBuilder, kind: types.Type, rows: ir.Value, first: ir.Value, count: int, d: ir.Value
) -> None:
    """Of count rows as many lines as hold LANES elements of each; for all d, all lines."""
    lines = max(1, count * vector_bytes(kind) // LINE)
    before = b.mul(b.udiv(d, I64(LANES)), I64(lines))
    for line in range(lines):
        nth = b.add(before, I64(line))
        row = row_at(b, rows, b.add(first, b.urem(nth, I64(count))))
        prefetch(b, plus(b, row, b.udiv(nth, I64(count)), LINE))


@emitted
def score_alone(context, kind, count, nbytes, queries, rows, partial, scores):
    """scores[j] = rows[j] . queries, for one head and at most LANES rows of so many bytes.

    partial: scratch of [LANES, LANES]. Rows are read in order: memory follows one stream well and
    several poorly.
    """

    def generate(context, b, signature, args):
        _, count, nbytes, queries, rows, partial, scores = args
        width = vector_bytes(kind)

        def emit(nbytes):
            offsets = range(0, nbytes // width * LANES, LANES)
            q = [load(b, types.float32, b.add(queries, I64(4 * x))) for x in offsets]

            def one(j, _):
                row, sums = row_at(b, rows, j), [ZEROS] * 4
                for i, x in enumerate(q):
                    if i * LANES % GROUP == 0:
                        group = parameters(b, kind, row, I64(nbytes), I64(i * LANES))
                    k = read(b, kind, b.add(row, I64(i * width)), group)
                    sums[i % 4] = fma(b, k, x, sums[i % 4])
                total = b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))
                store(b, total, plus(b, partial, j, VECTOR_BYTES))
                return []

            emit_loop(b, count, 1, [], one)

        def emit_any():
            def one(j, _):
                row = row_at(b, rows, j)

                def step(d, at, groups, sums):
                    k = read(b, kind, b.add(row, at), groups[0])
                    return [fma(b, k, load(b, types.float32, plus(b, queries, d, 4)), sums[0])]

                (total,) = emit_vectors(b, kind, [row], nbytes, [ZEROS], step)
                store(b, total, plus(b, partial, j, VECTOR_BYTES))
                return []

            emit_loop(b, count, 1, [], one)

        emit_switch(b, nbytes, [dim // LANES * width for dim in _COMMON_DIMS], emit, emit_any)
        places = [b.add(partial, I64(j * VECTOR_BYTES)) for j in range(LANES)]
        sums = [load(b, types.float32, place) for place in places]
        store(b, sums_of_neighbours(b, sums), scores)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3, MATRIX, *[types.int64] * 2), generate
