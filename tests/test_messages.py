"""Messages between stages say exactly what was meant, and malformed ones are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexgen_ray import SamplingParams
from flexgen_ray.kernels.sampling import NOT_FINITE, Penalties, SamplingRow
from flexgen_ray.layout.rows import Row, Rows, ScoredRow
from flexgen_ray.request import Request, Score
from flexgen_ray.runtime.messages import Header, SampledTokens
from flexgen_ray.runtime.ring import ChannelClosed
from flexgen_ray.runtime.scheduler import Scheduler

# Few values, so that columns with one value for all rows are common, and any value.
ints = st.sampled_from([0, 1]) | st.integers(0, 2**40)
floats = st.sampled_from([0.0, -0.0, 1.0, 0.1]) | st.floats()
numbers = floats | st.integers(0, 1) | st.booleans()
tokens = st.lists(ints, max_size=3).map(tuple)
counts = st.lists(st.tuples(ints, ints), max_size=3).map(tuple)
maybe = st.none() | ints
sampling_rows = st.builds(
    SamplingRow, numbers, floats, floats, maybe, maybe, ints, numbers, tokens,
    st.none() | st.builds(Penalties, numbers, floats, floats, tokens, counts),
    st.none() | tokens, st.lists(st.tuples(ints, floats), max_size=3).map(tuple),
)  # fmt: skip
scores = st.builds(Score, floats, ints, st.lists(st.tuples(ints, floats), max_size=3).map(tuple))
sampled_tokens = st.builds(
    SampledTokens, ints, ints, st.lists(st.just(NOT_FINITE) | ints),
    st.lists(st.tuples(ints, st.lists(scores, max_size=3)), max_size=4),
    st.dictionaries(ints, ints, max_size=3),
)  # fmt: skip


@st.composite
def headers(draw) -> Header:
    """Any header as a later stage has it: rows side by side, without tokens."""
    flags = st.booleans()
    values = draw(st.lists(st.tuples(ints, ints, ints, flags, flags), max_size=4))
    offsets = accumulate([count for _, _, count, _, _ in values], initial=0)
    rows = [Row(*row[:3], offset, *row[3:]) for row, offset in zip(values, offsets, strict=False)]
    scored = st.lists(st.builds(ScoredRow, ints, ints, tokens, ints), max_size=3).map(tuple)
    sampling = draw(st.lists(sampling_rows, max_size=4))
    if sampling and draw(flags):  # rows that differ from one in a single field
        sampling = [replace(sampling[0], min_p=row.min_p) for row in sampling]
    requests = draw(st.lists(ints, min_size=len(sampling), max_size=len(sampling)))
    packed = Rows(tuple(rows), (), draw(ints), draw(scored))
    return Header(draw(ints), draw(ints), packed, sampling, requests, draw(flags))


EQUAL_BUT_NOT_THE_SAME = [
    SamplingRow(number, 1.0, 0.5, bias=((7, number),)) for number in (0.0, -0.0, 0, False)
]


@given(headers() | sampled_tokens)
@example(Header(3, 1, Rows((), ()), EQUAL_BUT_NOT_THE_SAME, [5] * 4))
@example(SampledTokens(3, 1, [5, NOT_FINITE], not_finite={4: 17}))
@settings(max_examples=200, deadline=None)
def test_messages_say_what_was_meant_bit_for_bit(message):
    # Texts tell 0.0 from -0.0 and 1 from 1.0, and find NaN equal to itself.
    assert repr(type(message).decode(message.encode())) == repr(message)


@given(headers() | sampled_tokens, st.data())
@settings(max_examples=100, deadline=None)
def test_a_message_that_was_cut_is_refused(message, data):
    encoded = message.encode()
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ChannelClosed, match="malformed"):
        type(message).decode(encoded[:cut])


ROWS = {
    "slot": [0, 1], "position": [3, 4], "num_new_tokens": [1], "is_sampled": [True], "before": [0]
}  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,  # lacks is_prefill
        ROWS | {"is_prefill": [False] * 3},
        ROWS | {"is_prefill": 0},
        ROWS | {"is_prefill": [False], "position": [3, msgpack.ExtType(5, b"x")]},
    ],
)
def test_a_malformed_table_is_refused(rows):
    fields = {"visit": 0, "batch": 0, "is_last": False, "prefill_tokens": 0}
    Header.decode(msgpack.packb(fields | {"rows": ROWS | {"is_prefill": [False]}}))
    with pytest.raises(ChannelClosed, match="malformed"):
        Header.decode(msgpack.packb(fields | {"rows": rows}))


def test_sampling_params_of_any_size_fit_into_a_message():
    params = SamplingParams(top_k=10**30, repetition_penalty=10**30, seed=10**30)
    scheduler = Scheduler(1, 1, 8, frozenset())
    scheduler.add([Request(0, [1, 2], params)])
    rows = scheduler.compose(0)
    header = Header(0, 0, rows, scheduler.sampling_rows(0, [0]), [0])
    (row,) = Header.decode(header.encode()).sampling_rows
    assert (row.top_k, row.penalties.repetition) == (2**31 - 1, 1e30)
