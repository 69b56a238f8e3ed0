"""Tiles of host attention, except their scores (host_scores): for use within numba functions.

A tile is 8, 4, 2 or 1 query heads of one KV head, with BLOCK of its cached tokens at a time:

                          head_dim (padded to whole vectors)
                    +---------------------------------+
    query heads     |  queries                        |     8, 4, 2 or 1 rows
                    +---------------------------------+
                                                              scores of a block
                    +---------------------------------+       +-------+
    cached tokens   |  keys, then values              |  -->  | BLOCK |
    BLOCK at a time |                                 |       |   x   |
                    |                                 |       | heads |
                    +---------------------------------+       +-------+

For every block (online softmax, Milakov and Gimelshein, 2018):
    scores = keys @ queries                          host_scores
    scores = 2 ** (scores - largest so far)          softmax_block; sums shrink if that grew
    sums  += scores @ values                         add_weighted_values
and at the end results = sums / sum of weights       store_results

All of it is float32. Rows are padded to whole vectors: the last vector holds a row's last LANES
elements, so that nothing beside the row is read, and the queries have zeros in those of its lanes
that the vector before holds too.

queries: [padded / part, heads, part]; a vector has `part` elements of the queries of some heads
scores:  [BLOCK, heads], later weights; head h is in lanes h, h + heads, ... of every vector
sums:    [heads, padded], weighted sums of values
state:   [2, LANES]: each head's largest score so far; and the sum of its weights, spread over the
         lanes that a head has in a vector of scores

Knows the softmax's parts and weighted sums; no threads, and not which heads make up a tile.
"""

from __future__ import annotations

import math

import numba
from llvmlite import ir
from numba.core import types

from flexgen_ray.kernels.host_rows import (
    ROOM,
    count_lanes,
    load_parameters,
    read_vector,
    vector_offset,
)
from flexgen_ray.kernels.vectors import (
    F32,
    I64,
    LANES,
    MATRIX,
    VECTOR_BYTES,
    WIDE,
    ZEROS,
    constant,
    element_at,
    emit_loop,
    emit_switch,
    emitted,
    exp2,
    fma,
    is_packed,
    listed,
    load,
    load_repeated,
    maximum,
    narrow,
    prefetch,
    row_at,
    shuffle,
    size_in_bytes,
    smaller,
    splat,
    store,
    vector_bytes,
)
from flexgen_ray.quant.packing import GROUP

# A block's keys and values stay in the caches nearest to a core while further heads read them.
BLOCK = 64
TILES = (8, 4, 2, 1)
LINE = 64
# Vectors of values read at once, by number of heads, widest first: with all heads' sums they fit
# the registers.
_COLUMNS = {8: (2, 1) if WIDE else (1,), 4: (4, 1) if WIDE else (2, 1), 2: (4, 1), 1: (8, 4, 1)}
# Distance at which picked rows are prefetched; their list is longer than a block by as many.
AHEAD = ROOM
_UNROLLED = 4


def vectors_of_queries(kind: types.Type, heads: int) -> int:
    """Number of vectors that hold a part of every head's query and share each loaded key."""
    # A vector of 4-bit codes is read whole, since converting codes to numbers costs most.
    return heads if kind == types.int8 else min(heads, 4 if WIDE else 2)


def part_of_row(kind: types.Type, heads: int) -> int:
    """Number of a row's elements that a vector of queries holds for each of its heads."""
    return LANES * vectors_of_queries(kind, heads) // heads


@numba.njit(nogil=True)
def tile_at(head, heads, padded, memory):
    """Tile that begins at a head, as wide as the heads that are left allow.

    Returns its number of heads, the addresses of its queries and scores, the matrix of its sums,
    and the address of its state.
    """
    count = 1
    for count in TILES:
        if head + count <= heads:
            break
    queries = memory + 4 * head * floats_per_head(padded)
    scores = queries + 4 * count * padded
    sums = scores + 4 * count * BLOCK
    return count, queries, scores, (sums, 4 * padded), sums + 4 * count * padded


@numba.njit(nogil=True)
def floats_per_head(padded):
    """Workspace for one head's queries, scores and sums, and for the state of its tile."""
    return 2 * padded + BLOCK + 2 * LANES


@emitted
def start_tile(context, kind, heads, dim, scale, rows, queries, sums, state):
    """queries = rows * scale; sums and state as before the first token.

    rows: matrix of the heads' queries, dim elements each. For packed keys these are float32, in the
    order of the codes' lanes, and may lie where the sums do.
    """

    def generate(context, b, signature, args):
        _, heads, dim, scale, rows, queries, sums, state = args
        stored = types.float32 if is_packed(kind) else kind
        last = b.sub(dim, I64(LANES))
        lanes = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))

        def emit(heads):
            part = part_of_row(kind, heads)

            def step(d, _):
                at = smaller(b, d, last)
                new = b.icmp_signed(">=", lanes, splat(b, b.sub(d, at)))
                place = element_at(b, queries, d, 4 * heads)
                for head in range(heads):
                    row = element_at(b, row_at(b, rows, I64(head)), at, size_in_bytes(stored))
                    q = b.select(new, b.fmul(load(b, stored, row), splat(b, scale)), ZEROS)
                    for i in range(LANES // part):
                        piece = shuffle(b, q, q, list(range(i * part, (i + 1) * part)))
                        store(b, piece, b.add(place, I64(4 * (i * heads + head) * part)))
                    store(b, ZEROS, element_at(b, row_at(b, sums, I64(head)), d, 4))
                return []

            emit_loop(b, dim, LANES, [], step)

        emit_switch(b, heads, TILES, emit)
        store(b, constant(-math.inf), state)
        store(b, ZEROS, b.add(state, I64(VECTOR_BYTES)))
        return context.get_dummy_value()

    integers = [types.int64] * 2
    result = types.void(kind, *integers, types.float32, MATRIX, types.int64, MATRIX, types.int64)
    return result, generate


@emitted
def softmax_block(context, heads, tokens, dim, scores, sums, state):
    """Replace a block's scores by weights 2**(score - largest); shrink sums if the largest grew.

    heads, tokens: of the tile; dim: padded; scores, state: addresses; sums: matrix of the heads.
    """

    def generate(context, b, signature, args):
        heads, tokens, dim, scores, sums, state = args
        total_at = b.add(state, I64(VECTOR_BYTES))
        largest, total = (load(b, types.float32, place) for place in (state, total_at))

        def places(i):
            return [element_at(b, scores, b.add(i, I64(n * LANES)), 4) for n in range(_UNROLLED)]

        def emit(heads):
            valid, end = b.mul(tokens, I64(heads)), I64(BLOCK * heads)

            def clear(i, _):
                minus_infinity = ir.Constant(F32, -math.inf)
                store(b, minus_infinity, element_at(b, scores, b.add(valid, i), 4))
                return []

            def track_largest(i, largest):
                block = [load(b, types.float32, place) for place in places(i)]
                return [maximum(b, x, y) for x, y in zip(block, largest, strict=True)]

            def add_weights(i, added):
                block = [load(b, types.float32, place) for place in places(i)]
                weights = [exp2(b, b.fsub(x, new)) for x in block]
                for weight, place in zip(weights, places(i), strict=True):
                    store(b, weight, place)
                return [b.fadd(x, y) for x, y in zip(added, weights, strict=True)]

            # Lanes beyond the tokens weigh nothing; then the largest score, then the weights.
            emit_loop(b, b.sub(end, valid), 1, [], clear)
            candidates = emit_loop(b, end, _UNROLLED * LANES, [largest] * _UNROLLED, track_largest)
            new = reduce_per_head(b, heads, candidates, maximum)
            shrunk = exp2(b, b.fsub(largest, new))
            added = emit_loop(b, end, _UNROLLED * LANES, [ZEROS] * _UNROLLED, add_weights)
            store(b, new, state)
            store(b, fma(b, total, shrunk, reduce_pairwise(b, added, ir.IRBuilder.fadd)), total_at)

            def shrink(d, _):
                for head in range(heads):
                    place = element_at(b, row_at(b, sums, I64(head)), d, 4)
                    factor = shuffle(b, shrunk, shrunk, [head] * LANES)
                    store(b, b.fmul(load(b, types.float32, place), factor), place)
                return []

            changed = b.bitcast(b.fcmp_unordered("!=", shrunk, constant(1.0)), ir.IntType(LANES))
            any_changed = b.icmp_unsigned("!=", changed, changed.type(0))
            emit_loop(b, b.select(any_changed, dim, I64(0)), LANES, [], shrink)

        emit_switch(b, heads, TILES, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, MATRIX, types.int64), generate


def reduce_pairwise(b, vectors, combine):
    """One vector of several, combined in pairs; their number is a power of two."""
    while len(vectors) > 1:
        vectors = [combine(b, x, y) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def reduce_per_head(b, heads, vectors, combine):
    """Combine vectors, and then the lanes of each head, so that all lanes of a head agree."""
    vector, turn = reduce_pairwise(b, vectors, combine), heads
    while turn < LANES:
        turned = shuffle(b, vector, vector, [(lane + turn) % LANES for lane in range(LANES)])
        vector, turn = combine(b, vector, turned), 2 * turn
    return vector


@emitted
def add_weighted_values(context, kind, heads, shape, weights, values, sums, ahead):
    """sums[h, :] += weights[:, h] @ values; shape: (tokens, bytes of one row).

    values: list of the tokens' rows; ahead: list of rows that are read soon, and are prefetched.
    """

    def generate(context, b, signature, args):
        _, heads, shape, weights, values, sums, ahead = args
        tokens, nbytes = (b.extract_value(shape, i) for i in range(2))
        lanes, vector = count_lanes(b, kind, nbytes), vector_bytes(kind)

        # Sums of one strip of `columns` vectors, for all heads, stay in registers over all tokens.
        def strip(heads, columns, d):
            at, width = vector_offset(b, kind, nbytes, d), columns * vector

            def step(j, carried):
                row, later = listed(b, values, j), listed(b, ahead, j)
                v = []
                for c in range(columns):
                    if c * LANES % GROUP == 0:
                        group = load_parameters(b, kind, row, nbytes, b.add(d, I64(c * LANES)))
                    v.append(read_vector(b, kind, b.add(row, b.add(at, I64(c * vector))), group))
                for line in range(0, width if heads > 1 else 0, LINE):
                    prefetch(b, b.add(later, b.add(at, I64(line))))
                place = element_at(b, weights, j, 4 * heads)
                places = [b.add(place, I64(4 * h)) for h in range(heads)]
                w = [load_repeated(b, types.float32, place, count=1) for place in places]
                pairs = [(x, y) for x in w for y in v]
                return [fma(b, x, y, z) for (x, y), z in zip(pairs, carried, strict=True)]

            rows = [element_at(b, row_at(b, sums, I64(h)), d, 4) for h in range(heads)]
            places = [b.add(row, I64(c * VECTOR_BYTES)) for row in rows for c in range(columns)]
            first = [load(b, types.float32, place) for place in places]
            for place, total in zip(places, emit_loop(b, tokens, 1, first, step), strict=True):
                store(b, total, place)

        def emit(heads):
            start = I64(0)
            for columns in _COLUMNS[heads]:
                left, width = b.sub(lanes, start), I64(columns * LANES)
                if columns > 1:  # whole strips only; narrower ones take what is left
                    whole = b.mul(b.udiv(nbytes, I64(vector)), I64(LANES))
                    left = b.mul(b.udiv(b.sub(whole, start), width), width)

                def step(d, _, columns=columns, start=start):
                    strip(heads, columns, b.add(start, d))
                    return []

                emit_loop(b, left, columns * LANES, [], step)
                start = b.add(start, left)

        emit_switch(b, heads, TILES, emit)
        return context.get_dummy_value()

    integer = types.int64
    return types.void(kind, integer, MATRIX, integer, MATRIX, MATRIX, MATRIX), generate


@emitted
def store_results(context, kind, heads, dim, sums, state, rows):
    """rows = sums / sum of weights, narrowed to the kind; dim: elements of a row."""

    def generate(context, b, signature, args):
        _, heads, dim, sums, state, rows = args
        last = b.sub(dim, I64(LANES))
        terms = load(b, types.float32, b.add(state, I64(VECTOR_BYTES)))

        def emit(heads):
            total = reduce_per_head(b, heads, [terms], ir.IRBuilder.fadd)

            def step(d, _):
                at = b.mul(smaller(b, d, last), I64(size_in_bytes(kind)))
                for head in range(heads):
                    value = load(b, types.float32, element_at(b, row_at(b, sums, I64(head)), d, 4))
                    value = b.fdiv(value, shuffle(b, total, total, [head] * LANES))
                    store(b, narrow(b, kind, value), b.add(row_at(b, rows, I64(head)), at))
                return []

            emit_loop(b, dim, LANES, [], step)

        emit_switch(b, heads, TILES, emit)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 2, MATRIX, types.int64, MATRIX), generate
