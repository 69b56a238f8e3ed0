"""Scores of host attention's tiles (host_tiles has their layout): for use within numba functions.

Several heads share each key that is loaded, so arithmetic is their bottleneck; a single head waits
for memory. Each case has a loop of its own. Knows keys and queries; no softmax.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from flexgen_ray.kernels.host_rows import load_parameters, loop_over_vectors, read_vector
from flexgen_ray.kernels.host_tiles import LINE, TILES, part_of_row, vectors_of_queries
from flexgen_ray.kernels.vectors import (
    I64,
    LANES,
    MATRIX,
    VECTOR_BYTES,
    ZEROS,
    Values,
    element_at,
    emit_loop,
    emit_switch,
    emitted,
    fma,
    listed,
    load,
    prefetch,
    store,
    sum_neighbours,
    vector_bytes,
)
from flexgen_ray.quant.packing import GROUP

# Head dimensions for which the loop of a single head is unrolled.
_COMMON_DIMS = (64, 128)


@emitted
def score_heads(context, kind, heads, shape, queries, rows, scores, ahead):
    """scores[j, h] = rows[j] . queries[h], for two or more heads; shape: (rows, bytes of one row).

    rows, ahead: lists, with readable rows for whole vectors of scores.

    A vector of queries holds the same part of several heads' queries, say elements 0 to 3:

        q0[0:4] q1[0:4] q2[0:4] q3[0:4]

    That part of a key is repeated, once for each head, and multiplied with it. Where the heads
    don't fit one vector, the repeated part is multiplied with several vectors of queries.
    The rows of `ahead` are read soon. Heads compute for so long that memory would idle, so they are
    prefetched meanwhile.
    """

    def generate(context, b, signature, args):
        _, heads, shape, queries, rows, scores, ahead = args
        count, nbytes = (b.extract_value(shape, i) for i in range(2))

        def emit(heads):
            part, several = part_of_row(kind, heads), vectors_of_queries(kind, heads)
            at_once = LANES // several

            def some_rows(first, _):
                # Scores of rows beyond the last fall into unused places.
                some = [listed(b, rows, b.add(first, I64(j))) for j in range(at_once)]

                def step(d, at, groups, sums):
                    _prefetch_some(b, kind, ahead, first, at_once, d)
                    place = element_at(b, queries, d, 4 * heads)
                    vectors = [b.add(row, at) for row in some]
                    return _multiply(b, kind, heads, place, (vectors, groups), sums)

                sums = loop_over_vectors(b, kind, some, nbytes, [ZEROS] * LANES, step)
                place = element_at(b, scores, first, 4 * heads)
                for i in range(0, LANES, part):
                    dots = sum_neighbours(b, sums[i : i + part])
                    store(b, dots, b.add(place, I64(i // several * heads * 4)))
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
    """The sums [row, vector of queries] with the products of LANES elements added.

    queries: address of the heads' vectors for these elements; rows: addresses of each row's
    vector, and each row's parameters.
    """
    part, several, sums = part_of_row(kind, heads), vectors_of_queries(kind, heads), list(sums)
    for i in range(LANES // part):
        places = [b.add(queries, I64((i * several + n) * VECTOR_BYTES)) for n in range(several)]
        q = [load(b, types.float32, place) for place in places]
        for j, (vector, group) in enumerate(zip(*rows, strict=True)):
            k = read_vector(b, kind, vector, group, part, i)
            for n in range(several):
                sums[j * several + n] = fma(b, q[n], k, sums[j * several + n])
    return sums


def _prefetch_some(
    b: ir.IRBuilder, kind: types.Type, rows: ir.Value, first: ir.Value, count: int, d: ir.Value
) -> None:
    """Prefetch as many lines of count rows of a list as LANES elements of each take.

    d: lane at which the vectors being read begin; over all d, every line of the rows is fetched.
    """
    lines = max(1, count * vector_bytes(kind) // LINE)
    before = b.mul(b.udiv(d, I64(LANES)), I64(lines))
    for line in range(lines):
        nth = b.add(before, I64(line))
        row = listed(b, rows, b.add(first, b.urem(nth, I64(count))))
        prefetch(b, element_at(b, row, b.udiv(nth, I64(count)), LINE))


@emitted
def score_one_head(context, kind, count, nbytes, queries, rows, partial, scores):
    """scores[j] = rows[j] . queries, for one head and at most LANES rows of nbytes each.

    rows: list. partial: workspace, float32 [LANES, LANES]. Rows are read in order, because memory
    delivers one stream well and several poorly.
    """

    def generate(context, b, signature, args):
        _, count, nbytes, queries, rows, partial, scores = args
        width = vector_bytes(kind)

        def emit(nbytes):
            offsets = range(0, nbytes // width * LANES, LANES)
            q = [load(b, types.float32, b.add(queries, I64(4 * x))) for x in offsets]

            def one(j, _):
                row, sums = listed(b, rows, j), [ZEROS] * 4
                for i, x in enumerate(q):
                    if i * LANES % GROUP == 0:
                        group = load_parameters(b, kind, row, I64(nbytes), I64(i * LANES))
                    k = read_vector(b, kind, b.add(row, I64(i * width)), group)
                    sums[i % 4] = fma(b, k, x, sums[i % 4])
                total = b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))
                store(b, total, element_at(b, partial, j, VECTOR_BYTES))
                return []

            emit_loop(b, count, 1, [], one)

        def emit_any():
            def one(j, _):
                row = listed(b, rows, j)

                def step(d, at, groups, sums):
                    k = read_vector(b, kind, b.add(row, at), groups[0])
                    return [
                        fma(b, k, load(b, types.float32, element_at(b, queries, d, 4)), sums[0])
                    ]

                (total,) = loop_over_vectors(b, kind, [row], nbytes, [ZEROS], step)
                store(b, total, element_at(b, partial, j, VECTOR_BYTES))
                return []

            emit_loop(b, count, 1, [], one)

        emit_switch(b, nbytes, [dim // LANES * width for dim in _COMMON_DIMS], emit, emit_any)
        places = [b.add(partial, I64(j * VECTOR_BYTES)) for j in range(LANES)]
        sums = [load(b, types.float32, place) for place in places]
        store(b, sum_neighbours(b, sums), scores)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3, MATRIX, *[types.int64] * 2), generate
