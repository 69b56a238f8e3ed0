"""Chooses next tokens: greedy, or by inverting the distribution at one uniform number.

The number depends on (seed, request, position) alone, so the batch around a request never changes
its tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """How one row's next token is chosen; temperature 0 is greedy, uniform is in [0, 1).

    given: the token that it is, whatever is likely. top: how many of the likeliest are told with
    the token's score; None asks for no score.
    """

    temperature: float
    top_p: float
    uniform: float
    given: int | None = None
    top: int | None = None


def uniform(seed: int, stream: int, position: int) -> float:
    """A number in [0, 1), the same for the same three integers everywhere."""
    key = f"{seed}/{stream}/{position}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits: Tensor, draws: list[Draw]) -> Tensor:
    """logits: [rows, vocabulary], float32; returns [rows] token ids, still on its device."""
    tokens = logits.argmax(dim=-1)
    for row, draw in enumerate(draws):
        if draw.given is not None:
            tokens[row] = draw.given
        elif draw.temperature > 0:
            tokens[row] = _invert(logits[row], draw)
    return tokens


def _invert(logits: Tensor, draw: Draw) -> Tensor:
    """The first token, likeliest first, at which the cumulative probability exceeds the draw."""
    # Less its maximum, a logit divided by a tiny temperature can't overflow.
    scaled = (logits - logits.max()).double() / draw.temperature
    probabilities, tokens = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(dim=-1)
    # The nucleus is the fewest tokens that reach top_p (Holtzman et al. 2020).
    outside = cumulative >= draw.top_p if draw.top_p < 1 else cumulative.new_zeros(1)
    last = torch.where(outside.any(), outside.int().argmax(), len(cumulative) - 1)
    place = torch.searchsorted(cumulative, draw.uniform * cumulative.take(last), right=True)
    return tokens.take(torch.minimum(place, last))
