"""Chooses next tokens: greedy, or by inverting the distribution at one uniform number.

The number depends on (seed, request, position, sample) alone, so the batch around a request never
changes its tokens.

How likely tokens are, from logits that need not last. Knows logits; not whose they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flexgen_ray.kernels.indices import place_indices
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


NOT_FINITE = -1  # stands for the token of a row whose logits are NaN or infinite


@dataclass(frozen=True)
class Penalties:
    """What a row's tokens so far do to its logits, by vLLM's conventions.

    repetition: logits of tokens of prompt and answer are divided by it, or multiplied where they
    are negative. Then frequency, times how often the answer has a token, and presence, if it has
    it at all, are subtracted. prompt: its distinct tokens; answer: (token, how often), of its own.
    """

    presence: float
    frequency: float
    repetition: float
    prompt: tuple[int, ...]
    answer: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SamplingRow:
    """Settings that choose one row's next token; temperature 0 is greedy.

    uniform_number: in [0, 1), the point at which the distribution is inverted.
    forced_token: the token that follows, however unlikely it is; None to choose one.
    top: number of likeliest tokens reported with the token's score; None asks for no score.
    top_k: number of likeliest tokens to choose from, 0 for all.
    min_p: least probability of a token, as a share of the likeliest token's.
    banned: tokens that are never chosen; allowed: the only tokens to choose from, None for all.
    bias: (token, number added to its logit before penalties).
    """

    temperature: float
    top_p: float
    uniform_number: float
    forced_token: int | None = None
    top: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    banned: tuple[int, ...] = ()
    penalties: Penalties | None = None
    allowed: Sequence[int] | None = None
    bias: tuple[tuple[int, float], ...] = ()

    def encode(self) -> list:
        """For JSON, without what few draws have."""
        its = self.penalties and [*vars(self.penalties).values()]
        values = [*(vars(self) | {"penalties": its}).values()]
        usual = [it.default for it in fields(self)]
        while values[-1] == usual[len(values) - 1]:
            values.pop()
        return values

    @staticmethod
    def decode(values: list) -> SamplingRow:
        """The inverse."""
        draw = SamplingRow(*values)
        its: Any = draw.penalties
        answer = tuple((token, count) for token, count in its[4]) if its else ()
        return replace(
            draw,
            banned=tuple(draw.banned),
            penalties=its and Penalties(its[0], its[1], its[2], tuple(its[3]), answer),
            allowed=None if draw.allowed is None else tuple(draw.allowed),
            bias=tuple((token, value) for token, value in draw.bias),
        )


def uniform_number(seed: int, stream: int, position: int, sample: int = 0) -> float:
    """A number in [0, 1), the same for the same integers everywhere."""
    key = f"{seed}/{stream}/{position}" + (f"/{sample}" if sample else "")
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits: Tensor, draws: list[SamplingRow]) -> Tensor:
    """logits: [rows, vocabulary], float32; returns [rows] token ids, still on its device.

    A row of which a logit is NaN or +inf, or all are -inf, gets NOT_FINITE; a few of -inf are
    tokens that can't be chosen. The logits stay as they are; rows that are changed or drawn from
    are copied, a few at a time. Nothing here waits for the device, whose thread issues other lanes'
    ops too.
    """
    tokens = logits.argmax(dim=-1)
    # To argmax a NaN is the largest, so the largest logit tells of all; less itself it is 0 or NaN.
    largest = logits.gather(-1, tokens[:, None]).squeeze(-1)
    fails = largest.sub_(largest).isnan()
    forced = {row: it.forced_token for row, it in enumerate(draws) if it.forced_token is not None}
    if forced:
        values = place_indices([*forced.values()], tokens.device)
        tokens[place_indices([*forced], tokens.device)] = values
    rows = [row for row, draw in enumerate(draws) if row not in forced and _is_special(draw)]
    # A row takes 48 bytes a token here, and as many as 4 a row are free (cost/sizes.py).
    step = max(1, len(draws) // 12)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        places = place_indices(some, tokens.device)
        tokens[places] = _sample_rows(logits[places], [draws[row] for row in some])
    return tokens.masked_fill_(fails, NOT_FINITE)


def _is_special(draw: SamplingRow) -> bool:
    masked = draw.banned or draw.allowed is not None
    return bool(draw.temperature > 0 or masked or draw.penalties or draw.bias)


def _sample_rows(logits: Tensor, draws: list[SamplingRow]) -> Tensor:
    """Of rows that may be overwritten."""
    for row, draw in zip(logits, draws, strict=True):
        if draw.bias:
            biased, values = zip(*draw.bias, strict=True)
            added = place_indices(values, row.device, row.dtype)
            row.index_add_(0, place_indices(biased, row.device), added)
        if draw.penalties:
            apply_penalties(row, draw.penalties)
        if draw.allowed is not None:
            places = place_indices(draw.allowed, row.device)
            kept = row[places]
            row.fill_(float("-inf")).index_copy_(0, places, kept)
        if draw.banned:
            row.index_fill_(0, place_indices(draw.banned, row.device), float("-inf"))
    drawn = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if len(drawn) == len(draws):
        return _invert_cdf(logits, draws)
    tokens = logits.argmax(dim=-1)
    if drawn:
        places = place_indices(drawn, tokens.device)
        tokens[places] = _invert_cdf(logits[places], [draws[row] for row in drawn])
    return tokens


def apply_penalties(row: Tensor, its: Penalties) -> None:
    """row: [vocabulary] logits, changed in place."""
    pairs = place_indices(its.answer, row.device).view(-1, 2)
    tokens, counts = pairs.unbind(1)
    if its.repetition != 1:
        prompt = place_indices(its.prompt, row.device)
        # A token of both is written twice, with the same value.
        seen = torch.cat((prompt, tokens))
        # What overflows would leave no number after the softmax.
        by, most = min(max(its.repetition, 1e-30), 1e30), torch.finfo(row.dtype).max
        values = row[seen]
        row[seen] = torch.where(values > 0, values / by, values * by).clamp(-most, most)
    if its.frequency or its.presence:
        row[tokens] -= its.frequency * counts + its.presence


def _invert_cdf(logits: Tensor, draws: list[SamplingRow]) -> Tensor:
    """Of each row the first token, likeliest first, at which the cumulative probability exceeds
    the draw; after temperature min_p, top_k and top_p, in this order, each of what is left."""

    def column(values: list) -> Tensor:
        return place_indices(values, logits.device, torch.float64)[:, None]

    size = logits.shape[-1]
    count = min(max(draw.top_k or size for draw in draws), size)
    values, tokens = largest_logits(logits, count)
    # Less its maximum, a logit divided by a tiny temperature can't overflow.
    weights = (values - values[:, :1]).double()
    weights = weights.div_(column([draw.temperature for draw in draws])).exp_()
    last = column([min(draw.top_k or size, size) - 1 for draw in draws]).long()
    if any(draw.min_p for draw in draws):
        least = column([draw.min_p for draw in draws])
        likely = (weights >= least).sum(dim=-1, keepdim=True)  # 0 where weights are NaN
        last = torch.minimum(last, (likely - 1).clamp_(min=0))
    cumulative = weights.cumsum(dim=-1)
    top_p = column([draw.top_p for draw in draws])
    # The nucleus is the fewest tokens that reach top_p (Holtzman et al. 2020).
    reached = torch.searchsorted(cumulative, top_p * cumulative.gather(-1, last))
    last = torch.where(top_p < 1, torch.minimum(reached, last), last)
    number = column([draw.uniform_number for draw in draws]) * cumulative.gather(-1, last)
    place = torch.searchsorted(cumulative, number, right=True)
    return tokens.gather(-1, torch.minimum(place, last)).squeeze(-1)


def largest_logits(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, sorted, and their tokens; of equal ones the first first."""
    size = logits.shape[-1]
    if count == size and logits.is_cuda:
        values, tokens = logits.sort(dim=-1, descending=True, stable=True)
        return values, tokens
    # NumPy sorts numbers ten times as fast as torch, but no pairs: so a token's number becomes the
    # lower digits. Bits of floats are in order as integers', but for negative ones; -0 is 0.
    bits = (logits + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.bitwise_not_().long().mul_(2**32)
    keys += torch.arange(size, device=logits.device)
    if count < size:
        keys = keys.topk(count, dim=-1, largest=False).values
    else:
        keys.numpy().sort(axis=-1)
    tokens = keys.bitwise_and_(0xFFFFFFFF)
    return logits.gather(-1, tokens), tokens
