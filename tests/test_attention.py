"""The device's attention of a prompt's chunk: causal, within a window or not, however it is cut."""

from __future__ import annotations

import pytest
import torch
from attention_cases import softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_cuda import pretend_cuda

from flexgen_ray.kernels.attention import gather_pages, prefill
from flexgen_ray.kernels.prefix_attention import attend_in_parts, attend_shared


@given(
    start=st.integers(0, 20),
    tokens=st.integers(1, 20),
    window=st.none() | st.integers(1, 25),
    query_tile=st.integers(1, 25),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    has_sinks=st.booleans(),
)
@settings(max_examples=60)
def test_each_token_of_a_chunk_attends_itself_and_what_its_window_has(
    start, tokens, window, query_tile, kv_heads, group, has_sinks
):
    random = torch.Generator().manual_seed(start)
    seq, heads, dim = start + tokens, kv_heads * group, 8
    q = torch.randn(tokens, heads, dim, generator=random)
    k, v = torch.randn(2, kv_heads, seq, dim, generator=random)
    sinks = torch.randn(heads, generator=random) * 3 if has_sinks else None
    out = prefill(q, k, v, start, query_tile, window, sinks)
    for token in range(tokens):
        seen = slice(max(0, start + token + 1 - (window or seq)), start + token + 1)
        for head in range(heads):
            keys, values = (x[head // group, seen].double() for x in (k, v))
            scores = keys @ q[token, head].double() / dim**0.5
            own = None if sinks is None else sinks[head, None]
            weights = softmax(scores[None], own)[0][0]
            torch.testing.assert_close(
                out[token, head].double(), weights @ values, atol=1e-5, rtol=0
            )


@given(
    before=st.integers(1, 40),
    tokens=st.integers(1, 20),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    has_sinks=st.booleans(),
)
@settings(max_examples=40)
def test_a_chunk_attends_prefixes_and_its_own_tokens_apart_as_together(
    before, tokens, kv_heads, group, has_sinks
):
    random = torch.Generator().manual_seed(before)
    # As in a cell, attention replaces queries that lie between keys and values.
    q = torch.randn(tokens, kv_heads * group + 1, 8, generator=random)[:, 1:]
    k, v = torch.randn(2, kv_heads, before + tokens, 8, generator=random)
    sinks = torch.randn(kv_heads * group, generator=random) * 3 if has_sinks else None
    expected = prefill(q, k, v, before, sinks=sinks)
    attend_in_parts(q, (k[:, :before], v[:, :before]), (k[:, before:], v[:, before:]), q, sinks)
    torch.testing.assert_close(q, expected, atol=1e-5, rtol=0)


@given(rows=st.integers(1, 20), tokens=st.integers(1, 40), group=st.integers(1, 3))
@settings(max_examples=30)
def test_rows_attend_what_they_share_alike_in_one_call_of_torch_and_in_products(
    rows, tokens, group
):
    random = torch.Generator().manual_seed(rows)
    q = torch.randn(rows, 2 * group, 8, generator=random)
    k, v = torch.randn(2, 2, tokens, 8, generator=random)
    starts = torch.zeros(rows, dtype=torch.long)
    in_products = attend_shared(q, k, v, starts)
    for ours, theirs in zip(attend_shared(q, k, v), in_products, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself is there")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_multiplied_on_a_gpu_with_float32_sums(dtype):
    """Scores and their sums are those of float32; only weights are rounded."""
    random = torch.Generator().manual_seed(0)
    q = 4 * torch.randn(9, 6, 32, generator=random).to(dtype)
    k, v = torch.randn(2, 2, 500, 32, generator=random).to(dtype)
    out, sums = attend_shared(q.float(), k.float(), v.float())
    launched: list[str] = []
    with pretend_cuda() as device:
        on_gpu = [each.to("cuda") for each in (q, k, v)]
        starts = torch.zeros(9, dtype=torch.long, device="cuda")
        device.launch = launched.append
        found = [each.cpu() for each in attend_shared(*on_gpu, starts)]
        del on_gpu, starts
    assert (launched.count("bmm"), launched.count("_to_copy")) == (2, 1)
    assert [each.dtype for each in found] == [torch.float32] * 2
    torch.testing.assert_close(found[1], sums, atol=2e-5, rtol=0)
    torch.testing.assert_close(found[0], out, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_gathered_pages_take_memory_for_these_alone():
    pool = torch.randn(2, 1000, 4, 16, 8)
    pages = torch.tensor([[3, 5, 700], [999, 0, 1]], dtype=torch.int32)
    with torch.profiler.profile(profile_memory=True) as profile:
        gathered = gather_pages(pool[1], pages, slice(3, 40))
    assert gathered.shape == (2, 4, 37, 8)
    assert torch.equal(gathered[1, 2, 20], pool[1, 0, 2, 7])
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated <= 2 * pages.numel() * pool[0, 0].nbytes
