"""The original's planner, as its authors left it: what it says of their own machine."""

from __future__ import annotations

import pytest

from benchmarks.original import Original
from flexgen_ray.config import Placement, Policy
from flexgen_ray.models.shapes import shape_config

HOST = Placement(0, 1, 0)
ON_30B = Policy(48, 3, 2048, Placement(0.2, 0.8, 0), HOST, HOST)


def test_its_sums_are_those_that_its_formulas_give_by_hand():
    """OPT-30B, prompt 512: maths bind the prefill, and decode waits for loads, then the host's."""
    config = shape_config("opt-30b")
    said = Original(config, ON_30B, 512, 32)
    width, block, gib = 7168, 144, 2**30
    weights, tokens = 24 * width**2, 512 * block
    maths = tokens * weights / 21.24e12 + 4 * tokens * 512 * width / 9.97e12
    assert said.prefill_seconds == pytest.approx(48 * maths)
    load = (0.8 * weights + 2 * width * block) / (12.89 * gib)
    host = 12.3e9 * (1 - 0.0328 * 0.41503749927884376)
    maths = block * weights / 4.3e12 + 4 * block * 528 * width / host
    assert said.decode_seconds == pytest.approx(48 * (load + maths), rel=1e-6)


@pytest.mark.parametrize(
    "prompt_len, policy, published",
    [(512, ON_30B, 7.32), (1024, Policy(20, 4, 2048, Placement(0.04, 0.96, 0), HOST, HOST), 3.50)],
)
def test_it_comes_near_what_was_published_for_30b(prompt_len, policy, published):
    said = Original(shape_config("opt-30b"), policy, prompt_len, 32)
    assert said.tokens_per_s == pytest.approx(published, rel=0.2)
