"""Sparse attention (top-k): the tokens that weigh most are kept, and only their values matter."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_host_attention import Case, make_case

from flexgen_ray.models import attention
from flexgen_ray.models.attention import decode, decode_sparse, kept_tokens

cases = st.builds(
    make_case,
    dtype=st.just(torch.float32),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 64, 80]),
    lens=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    spread=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 2**20),
)
shares = st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9, 1.0])


def one_by_one(case: Case, sparsity: float) -> torch.Tensor:
    """In float64, a row and KV head at a time, by sorting."""
    out = torch.empty_like(case.q, dtype=torch.float64)
    for row, end in enumerate(case.lens):
        group = case.q.shape[1] // case.k.shape[1]
        for head, (k, v) in enumerate(zip(case.k[row].double(), case.v[row].double(), strict=True)):
            heads = slice(head * group, (head + 1) * group)
            scores = case.q[row, heads].double() @ k[:end].T / k.shape[1] ** 0.5
            weights = scores.softmax(-1).sum(0).tolist()
            by_weight = sorted(range(end), key=lambda token: (-weights[token], token))
            kept = by_weight[: max(1, math.ceil(Fraction(str(sparsity)) * end))]
            out[row, heads] = scores[:, kept].softmax(-1) @ v[kept]
    return out


@given(case=cases, sparsity=shares)
@settings(max_examples=60, deadline=None)
def test_the_tokens_that_weigh_most_are_attended_whatever_lies_beyond_a_row(case, sparsity):
    out = decode_sparse(case.q, case.k, case.v, case.lens, sparsity)
    torch.testing.assert_close(out.double(), one_by_one(case, sparsity), rtol=1e-4, atol=1e-4)


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
        attention.kept_tokens(5, sparsity)
