"""Chooses next tokens: greedy, or by inverting the distribution at one uniform number.

The number depends on (seed, request, position) alone, so the batch around a request never changes
its tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_ray.request import SamplingParams


@dataclass(frozen=True)
class Draw:
    """How one row's next token is chosen; uniform is in [0, 1)."""

    params: SamplingParams
    uniform: float


def uniform(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1), the same for the same three integers everywhere."""
    key = f"{seed}/{stream}/{position}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits: Tensor, draws: list[Draw]) -> list[int]:
    """logits: [rows, vocabulary], float32; returns one token a row."""
    tokens = logits.argmax(dim=-1).tolist()
    for row, draw in enumerate(draws):
        if draw.params.temperature > 0:
            tokens[row] = _invert(logits[row], draw)
    return tokens


def _invert(logits: Tensor, draw: Draw) -> int:
    """The first token, likeliest first, at which the cumulative probability exceeds the draw."""
    # Less its maximum, a logit divided by a tiny temperature can't overflow.
    scaled = (logits - logits.max()).double() / draw.params.temperature
    probabilities, tokens = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(dim=-1)
    if draw.params.top_p < 1:
        # The nucleus is the fewest tokens that reach top_p (Holtzman et al. 2020).
        size = int((cumulative < draw.params.top_p).sum()) + 1
        cumulative = cumulative[:size]
    place = torch.searchsorted(cumulative, draw.uniform * cumulative[-1], right=True)
    return int(tokens[min(int(place), len(cumulative) - 1)])
