"""Sparse attention (top-k): the tokens that weigh most are kept, and only their values matter."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from attention_cases import Case, make_case, packed, page_sizes, softmax, windows
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexgen_ray.config import kept_tokens
from flexgen_ray.kernels import host_kernel
from flexgen_ray.kernels.attention import decode, decode_sparse
from flexgen_ray.kernels.host_attention import HostAttention
from flexgen_ray.kernels.host_sparse import keep_largest
from flexgen_ray.kernels.host_tiles import BLOCK

cases = st.builds(
    make_case,
    dtype=st.just(torch.float32),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 64, 80]),
    lens=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    spread=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 2**20),
    window=windows,
    page=page_sizes,
    shared=st.integers(0, 100),
    has_sinks=st.booleans(),
)
shares = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 1.0])


def one_by_one(case: Case, sparsity: float) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """In float64, a row and KV head at a time, by sorting; and logarithms of sums of exp(score).

    And whether float32, too, tells the last token that is kept from the first that is not.
    """
    out, clear = torch.empty_like(case.q, dtype=torch.float64), True
    log_sums = torch.empty_like(out[..., 0])
    for row in range(len(case.lens)):
        group, seen = case.q.shape[1] // case.k.shape[1], case.tokens(row)
        for head in range(case.k.shape[1]):
            k, v = (x[row, head, seen].double() for x in (case.k, case.v))
            heads = slice(head * group, (head + 1) * group)
            scores = case.q[row, heads].double() @ k.T / k.shape[1] ** 0.5
            sinks = None if case.sinks is None else case.sinks[heads]
            weights = softmax(scores, sinks)[0].sum(0).tolist()
            by_weight = sorted(range(len(k)), key=lambda token: (-weights[token], token))
            count = max(1, math.ceil(Fraction(str(sparsity)) * len(k)))
            kept, others = by_weight[:count], by_weight[count:]
            clear &= not others or weights[others[0]] < weights[kept[-1]] * (1 - 1e-5)
            shares, log_sums[row, heads] = softmax(scores[:, kept], sinks)
            out[row, heads] = shares @ v[kept]
    return out, log_sums, clear


@given(case=cases, sparsity=shares)
@settings(max_examples=25, deadline=None)
def test_the_tokens_that_weigh_most_are_attended_whatever_lies_beyond_a_row(case, sparsity):
    expected, _, clear = one_by_one(case, sparsity)
    assume(clear)
    how = {"window": case.window, "sinks": case.sinks}
    out = decode_sparse(case.q, case.k, case.v, case.lens, sparsity, **how)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_of_tokens_that_weigh_the_same_the_first_are_kept():
    q, k = torch.ones(1, 2, 16), torch.ones(1, 1, 10, 16)
    v = torch.arange(10.0).view(1, 1, 10, 1).expand(1, 1, 10, 16)
    assert (decode_sparse(q, k, v, [10], 0.4) == 1.5).all()
    k[0, 0, 7] = 2
    assert (decode_sparse(q, k, v, [10], 0.1) == 7).all()


def test_keeping_all_is_dense_attention():
    case = make_case(torch.float32, 2, group=3, head_dim=64, lens=[9, 33, 20])
    k, v = case.k.nan_to_num(), case.v.nan_to_num()
    sparse = decode_sparse(case.q, k, v, case.lens, 1.0)
    torch.testing.assert_close(sparse, decode(case.q, k, v, case.lens))


@given(hundredths=st.integers(1, 100), tokens=st.integers(1, 10**6))
def test_a_share_of_tokens_is_rounded_up_but_not_because_floats_are_inexact(hundredths, tokens):
    kept = kept_tokens(tokens, hundredths / 100)
    assert kept == -(-hundredths * tokens // 100)


@pytest.mark.parametrize("sparsity", [0.0, -0.1, 1.1, math.nan])
def test_a_share_beyond_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        kept_tokens(5, sparsity)


@given(case=cases, sparsity=shares, bits=st.sampled_from([None, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_on_the_host_the_same_tokens_are_kept(case, sparsity, bits):
    cached = case
    if bits is not None:
        cached, case = packed(case, bits)
    expected, log_sums, clear = one_by_one(case, sparsity)
    assume(clear)
    lse = torch.empty(case.q.shape[:2])
    out = cached.run(sparsity=sparsity, lse=lse)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), log_sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("group", [1, 9])
def test_on_the_host_to_keep_every_token_changes_no_bit(group, bits):
    case = make_case(torch.float32, 2, group, head_dim=80, lens=[700, 1, 63, 64, 65])
    cached = case if bits is None else packed(case, bits)[0]
    assert torch.equal(cached.run(sparsity=0.9999), cached.run())


@pytest.mark.parametrize("bits", [None, 4])
def test_on_the_host_values_that_are_not_kept_are_not_read(bits):
    case = make_case(torch.float32, 2, group=3, head_dim=64, lens=[150])
    cached = case if bits is None else packed(case, bits)[0]
    before = cached.run(sparsity=0.1)
    unkept = cached.v.clone()
    for head in range(2):
        for token in range(150):
            saved = unkept[0, head, token].clone()
            unkept[0, head, token] = 255 if bits else math.nan
            if not torch.equal(replace(cached, v=unkept).run(sparsity=0.1), before):
                unkept[0, head, token] = saved
    assert torch.equal(replace(cached, v=unkept).run(sparsity=0.1), before)
    poisoned = (unkept != cached.v).any(-1) | (unkept != unkept).any(-1)
    assert (poisoned[0, :, :150].sum(-1) == 150 - 15).all()


@pytest.mark.parametrize("bits", [None, 4])
def test_threads_and_company_change_no_bit_of_sparse_attention(bits):
    case = make_case(torch.float16, 3, group=5, head_dim=80, lens=[700, 1, 63, 64, 65, 1024])
    cached = case if bits is None else packed(case, bits)[0]
    alone = cached.run(sparsity=0.1)
    assert torch.equal(cached.run(HostAttention(3), 0.1), alone)
    for row, end in enumerate(case.lens):
        part = slice(row, row + 1)
        single = Case(cached.q[part], cached.k[part], cached.v[part], [end])
        assert torch.equal(single.run(sparsity=0.1), alone[part])


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-40, 0.25, 0.5, 1.0, 8.0]), min_size=1, max_size=200),
    share=st.floats(0.01, 1),
)
def test_of_equal_weights_the_first_are_kept(weights, share):
    tokens, count = len(weights), math.ceil(share * len(weights))
    room = np.zeros(-(-tokens // BLOCK) * BLOCK, np.float32)
    room[:tokens] = weights
    kept = np.zeros(len(room) + 1, np.int64)
    assert keep_largest(room, tokens, count, kept) == count
    by_weight = sorted(range(tokens), key=lambda token: (-room[token], token))
    assert kept[:count].tolist() == sorted(by_weight[:count])


@pytest.mark.parametrize("name", host_kernel.KERNELS)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("bits", [None, 8])
def test_both_kernels_attend_sparsely(name, bits, window):
    case = make_case(torch.float32, 2, group=3, head_dim=64, lens=[33, 57], window=window)
    cached, case = (case, case) if bits is None else packed(case, bits)
    lse = torch.empty(case.q.shape[:2])
    out = cached.run(host_kernel.load_kernel(name, threads=2), 0.2, lse)
    expected, log_sums, clear = one_by_one(case, 0.2)
    assert clear
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), log_sums, rtol=1e-4, atol=1e-4)


def test_a_choice_for_sparse_attention_is_one_of_its_own(tmp_path):
    shape = host_kernel.AttentionShape("float32", 4, 2, 64, sparsity=0.1)
    times = host_kernel.measure(shape, threads=1, nbytes=1 << 20)
    assert set(times) == set(host_kernel.KERNELS) and all(it > 0 for it in times.values())
    host_kernel.choose_kernel(shape, 1, tmp_path, nbytes=1 << 20)
    host_kernel.choose_kernel(replace(shape, sparsity=1.0), 1, tmp_path, nbytes=1 << 20)
    (kept,) = tmp_path.iterdir()
    assert len(kept.read_text().splitlines()) == 4
