"""The device's attention of a prompt's chunk: causal, within a window or not, however it is cut."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray.kernels.attention import prefill


@given(
    start=st.integers(0, 20),
    tokens=st.integers(1, 20),
    window=st.none() | st.integers(1, 25),
    query_tile=st.integers(1, 25),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
)
@settings(max_examples=60)
def test_each_token_of_a_chunk_attends_itself_and_what_its_window_has(
    start, tokens, window, query_tile, kv_heads, group
):
    random = torch.Generator().manual_seed(start)
    seq, heads, dim = start + tokens, kv_heads * group, 8
    q = torch.randn(tokens, heads, dim, generator=random)
    k, v = torch.randn(2, kv_heads, seq, dim, generator=random)
    out = prefill(q, k, v, start, query_tile, window)
    for token in range(tokens):
        seen = slice(max(0, start + token + 1 - (window or seq)), start + token + 1)
        for head in range(heads):
            keys, values = (x[head // group, seen].double() for x in (k, v))
            weights = (keys @ q[token, head].double() / dim**0.5).softmax(-1)
            torch.testing.assert_close(
                out[token, head].double(), weights @ values, atol=1e-5, rtol=0
            )
