"""Choice of next tokens, and scores of tokens, from logits.

Tokens are chosen greedily, or by inverting the distribution at one uniform number. That number
depends on (seed, request, position, sample) alone, so the requests beside one in a batch never
change its tokens. Knows logits; not whose they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.request import Score

NOT_FINITE = -1  # token of a row whose logits are NaN or infinite


@dataclass(frozen=True)
class Penalties:
    """Penalties on the tokens that a row has so far, by vLLM's conventions.

    repetition: divides the logits of the prompt's and the answer's tokens, or multiplies them where
    they are negative.
    frequency: subtracted, times the number of occurrences, from logits of the answer's tokens.
    presence: subtracted once from each of these.
    prompt: distinct tokens of the prompt; answer: (token, number of occurrences) in the answer.
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


def sample(logits: Tensor, settings: list[SamplingRow]) -> Tensor:
    """Choose the next token of each row.

    logits: [rows, vocabulary], float32, left as they are; settings: one entry for each row.
    Returns [rows] token ids on the logits' device. A row gets NOT_FINITE if a logit is NaN or +inf,
    or if all are -inf; single logits of -inf are tokens that can't be chosen.

    Every row starts with its greedy token. Rows that need more are copied, a few at a time. Nothing
    here waits for the device, because its thread issues the ops of other lanes too.
    """
    tokens = logits.argmax(dim=-1)
    # argmax takes NaN for the largest, so the largest logit shows whether any is not finite:
    # subtracted from itself it is 0, or else NaN.
    largest = logits.gather(-1, tokens[:, None]).squeeze(-1)
    fails = largest.sub_(largest).isnan()
    forced = {row: own.forced_token for row, own in enumerate(settings)}
    forced = {row: token for row, token in forced.items() if token is not None}
    if forced:
        values = place_indices([*forced.values()], tokens.device)
        tokens[place_indices([*forced], tokens.device)] = values
    rows = [row for row, own in enumerate(settings) if row not in forced and _is_special(own)]
    # A row takes 48 bytes a token of the vocabulary here, and there is room for 4 a token and row
    # (layout/sizes.py), so a twelfth of the rows is treated at a time.
    step = max(1, len(settings) // 12)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        places = place_indices(some, tokens.device)
        tokens[places] = _sample_rows(logits[places], [settings[row] for row in some])
    return tokens.masked_fill_(fails, NOT_FINITE)


def _is_special(row: SamplingRow) -> bool:
    """True if the row's token need not be the one with the largest logit."""
    masked = row.banned or row.allowed is not None
    return bool(row.temperature > 0 or masked or row.penalties or row.bias)


def _sample_rows(logits: Tensor, settings: list[SamplingRow]) -> Tensor:
    """Choose tokens of rows that are special; their logits may be overwritten."""
    for row, own in zip(logits, settings, strict=True):
        if own.bias:
            biased, values = zip(*own.bias, strict=True)
            added = place_indices(values, row.device, row.dtype)
            row.index_add_(0, place_indices(biased, row.device), added)
        if own.penalties:
            apply_penalties(row, own.penalties)
        if own.allowed is not None:
            places = place_indices(own.allowed, row.device)
            allowed = row[places]
            row.fill_(float("-inf")).index_copy_(0, places, allowed)
        if own.banned:
            row.index_fill_(0, place_indices(own.banned, row.device), float("-inf"))
    drawn = [row for row, own in enumerate(settings) if own.temperature > 0]
    if len(drawn) == len(settings):
        return _invert_cdf(logits, settings)
    tokens = logits.argmax(dim=-1)
    if drawn:
        places = place_indices(drawn, tokens.device)
        tokens[places] = _invert_cdf(logits[places], [settings[row] for row in drawn])
    return tokens


def apply_penalties(row: Tensor, penalties: Penalties) -> None:
    """Penalize the tokens that a row has so far; row: [vocabulary] logits, changed in place."""
    pairs = place_indices(penalties.answer, row.device).view(-1, 2)
    tokens, counts = pairs.unbind(1)
    if penalties.repetition != 1:
        prompt = place_indices(penalties.prompt, row.device)
        # A token of both prompt and answer is written twice, with the same value.
        seen = torch.cat((prompt, tokens))
        # An overflow would make the softmax NaN.
        by, most = min(max(penalties.repetition, 1e-30), 1e30), torch.finfo(row.dtype).max
        values = row[seen]
        row[seen] = torch.where(values > 0, values / by, values * by).clamp(-most, most)
    if penalties.frequency or penalties.presence:
        row[tokens] -= penalties.frequency * counts + penalties.presence


def _invert_cdf(logits: Tensor, settings: list[SamplingRow]) -> Tensor:
    """Sample by inverting the cumulative distribution; returns [rows] tokens.

    Sorts tokens by probability and takes the first whose cumulative probability exceeds the row's
    uniform number. Applies temperature, min_p, top_k and top_p, in this order. Probabilities stay
    unnormalized: `last` is the place of the last token that may be chosen, and the number is scaled
    to the sum up to there.
    """

    def column(values: list) -> Tensor:
        return place_indices(values, logits.device, torch.float64)[:, None]

    size = logits.shape[-1]
    count = min(max(own.top_k or size for own in settings), size)
    values, tokens = largest_logits(logits, count)
    # With its maximum subtracted, a logit divided by a tiny temperature can't overflow.
    weights = (values - values[:, :1]).double()
    weights = weights.div_(column([own.temperature for own in settings])).exp_()
    last = column([min(own.top_k or size, size) - 1 for own in settings]).long()
    if any(own.min_p for own in settings):
        least = column([own.min_p for own in settings])
        likely = (weights >= least).sum(dim=-1, keepdim=True)  # 0 where weights are NaN
        last = torch.minimum(last, (likely - 1).clamp_(min=0))
    cumulative = weights.cumsum(dim=-1)
    top_p = column([own.top_p for own in settings])
    # The nucleus is the fewest tokens whose sum reaches top_p (Holtzman et al., 2020).
    reached = torch.searchsorted(cumulative, top_p * cumulative.gather(-1, last))
    last = torch.where(top_p < 1, torch.minimum(reached, last), last)
    number = column([own.uniform_number for own in settings]) * cumulative.gather(-1, last)
    place = torch.searchsorted(cumulative, number, right=True)
    return tokens.gather(-1, torch.minimum(place, last)).squeeze(-1)


def largest_logits(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest logits of each row and their tokens, each [rows, count], largest first.

    Equal logits are in the order of their tokens.
    """
    size = logits.shape[-1]
    if count == size and logits.is_cuda:
        values, tokens = logits.sort(dim=-1, descending=True, stable=True)
        return values, tokens
    # NumPy sorts integers ten times as fast as torch sorts floats, but it sorts no pairs. So logit
    # and token become one integer: the logit's bits above, the token's number below. The bits of
    # positive floats are in their order as integers; those of negative ones are mirrored first,
    # and -0.0 becomes 0.0. All are inverted, so that the largest logit comes first.
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


def uniform_number(seed: int, stream: int, position: int, sample: int = 0) -> float:
    """Pseudorandom number in [0, 1) that depends on these integers alone, on every machine."""
    key = f"{seed}/{stream}/{position}" + (f"/{sample}" if sample else "")
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


@dataclass(frozen=True)
class Scores:
    """Scores of several tokens, on the logits' device.

    logprobs, ranks: [tokens], a float and an int each; a logprob is NaN where the logits are not
    finite. top_ids, top_logprobs: [tokens, top], the likeliest tokens in each one's place.
    """

    logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def tolist(self) -> list[Score]:
        """Scores on the host; waits for the device."""
        ids, logprobs = self.top_ids.tolist(), self.top_logprobs.tolist()
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]
        return [*map(Score, self.logprobs.tolist(), self.ranks.tolist(), tops)]


def score(logits: Tensor, token_ids: Tensor, top: int) -> Scores:
    """Log-probabilities and ranks of tokens, and the `top` likeliest tokens beside each.

    logits: [tokens, vocabulary], float32; token_ids: [tokens], the token to score in each row.
    The softmax's logarithm is computed for these tokens only. Of equal logits the first ranks
    first, as in greedy decoding.
    """
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    tokens = token_ids[:, None]
    own = logits.gather(-1, tokens)
    ahead = logits > own
    ahead |= (logits == own).logical_and_(torch.arange(len(logits[0]), device=own.device) < tokens)
    # A sum of 64-bit integers would take a copy twice as large as the logits.
    ranks = 1 + ahead.sum(dim=-1, dtype=torch.int32)
    best = logits.topk(min(top, logits.shape[-1]), dim=-1)
    # normaliser - normaliser is 0, or NaN if the logits are not finite.
    logprobs = (own - normaliser + (normaliser - normaliser)).squeeze(-1)
    return Scores(logprobs, ranks, best.indices.int(), best.values - normaliser)
