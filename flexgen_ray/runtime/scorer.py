"""How likely tokens are, from logits that need not last. Knows logits; not whose they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_ray.request import Score


@dataclass(frozen=True)
class Scores:
    """Scores of several tokens, on the logits' device: a float and an int each, and [tokens, top].

    A logprob is NaN where the logits are not finite, as of sampler.NOT_FINITE.
    """

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def tolist(self) -> list[Score]:
        """Waits for the device."""
        ids, logprobs = self.top_ids.tolist(), self.top_logprobs.tolist()
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
        return [*map(Score, self.logprobs.tolist(), self.ranks.tolist(), tops)]


def score(logits: Tensor, token_ids: Tensor, top: int) -> Scores:
    """logits: [tokens, vocabulary], float32; token_ids: [tokens] the token that each is about.

    The softmax's logarithm, where it is asked for only: of the tokens and the `top` likeliest. Of
    equal logits the first ranks first, as greedy decoding has it.
    """
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    tokens = token_ids[:, None]
    own = logits.gather(-1, tokens)
    ahead = logits > own
    ahead |= (logits == own).logical_and_(torch.arange(len(logits[0]), device=own.device) < tokens)
    # As a sum of 64-bit numbers it would be taken from a copy twice as large as the logits.
    ranks = 1 + ahead.sum(dim=-1, dtype=torch.int32)
    best = logits.topk(min(top, logits.shape[-1]), dim=-1)
    # Infinity less itself is NaN, and zero otherwise.
    logprobs = (own - normaliser + (normaliser - normaliser)).squeeze(-1)
    return Scores(logprobs, ranks, best.indices.int(), best.values - normaliser)
