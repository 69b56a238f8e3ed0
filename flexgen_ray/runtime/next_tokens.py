"""Choice of an answer's next token, and its end: what the parameters of a request ask for.

Knows one sequence; no batches, no passes and no logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flexgen_ray.kernels.sampling import SamplingRow, uniform_number
from flexgen_ray.request import Finished, Request, SamplingParams
from flexgen_ray.runtime.sequence import Sequence

# Exceeds any vocabulary; messages hold no integer of more than 64 bits.
_ALL_TOKENS = 2**31 - 1

FindStop = Callable[[list[int], int, SamplingParams], str | None]


@dataclass(frozen=True)
class NextTokens:
    """Settings for next tokens, and the ends of answers; fields are those of Scheduler."""

    eos_token_ids: frozenset[int]
    find_stop: FindStop | None = None
    seed: int = 0

    def sampling_row(self, sequence: Sequence) -> SamplingRow:
        """Settings that choose a sequence's next token."""
        request, params = sequence.request, sequence.request.params
        position = len(sequence.generated)
        if params.temperature == 0:
            number = 0.0
        elif params.seed is not None:
            number = uniform_number(params.seed, -1, position, request.sample)
        else:
            stream = request.index if request.first is None else request.first
            number = uniform_number(self.seed, stream, position, request.sample)
        forced = request.forced_token_ids
        forced_token = forced[position] if position < len(forced) else None
        first = request.scored_from
        top = None if first is None or len(sequence.token_ids) < first else request.top
        return SamplingRow(
            params.temperature,
            params.top_p,
            number,
            forced_token,
            top,
            min(max(params.top_k, 0), _ALL_TOKENS),
            params.min_p,
            self._banned(sequence),
            sequence.penalties() if params.has_penalties else None,
            params.allowed_token_ids,
            tuple(params.logit_bias.items()) if params.logit_bias else (),
        )

    def _banned(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens that may not follow: ends before min_tokens, and those that complete bad words."""
        params, position = sequence.request.params, len(sequence.generated)
        banned = {*self._ends(params)} if position < params.min_tokens else set()
        for *before, last in sequence.request.bad_words:
            count = len(before)
            if (
                count <= position
                and sequence.token_ids[len(sequence.token_ids) - count :] == before
            ):
                banned.add(last)
        return tuple(sorted(banned))

    def may_end(self, request: Request) -> bool:
        """True if an answer may end before max_tokens."""
        return bool(request.params.stop or self._ends(request.params))

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end an answer."""
        ends = frozenset(params.stop_token_ids)
        return ends if params.ignore_eos else ends | self.eos_token_ids

    def finished_by(self, sequence: Sequence, token: int) -> Finished | None:
        """Result of the request if its newest token is its last, else None."""
        request, params, count = sequence.request, sequence.request.params, len(sequence.generated)
        reason = "length" if count >= request.max_tokens else None
        stop: int | str | None = None
        if count > len(request.forced_token_ids):
            ends = token in self._ends(params)
            stop = None if ends else self._newest_stop(sequence, count)
            if ends or stop is not None:
                reason = "stop"
            if ends and (params.ignore_eos or token not in self.eos_token_ids):
                stop = token
        if reason is None:
            return None
        return Finished(request.index, sequence.generated, reason, sequence.scores, stop)

    def _newest_stop(self, sequence: Sequence, count: int) -> str | None:
        """Stop string that the newest token completes, if any."""
        request, params = sequence.request, sequence.request.params
        if not params.stop or count <= params.min_tokens:
            return None
        assert self.find_stop is not None, "stop strings need a tokenizer"
        begin = len(request.prompt_token_ids) + len(request.forced_token_ids)
        return self.find_stop(sequence.token_ids, begin, params)


_REMEDIES = {
    "float16": "use --dtype bfloat16 or float32",
    "bfloat16": "use --dtype float32",
    "float32": "its weights may be damaged, or the prompt may be one that they can't take",
}


def not_finite_message(place: int, dtype: str = "float32", cache_bits: int | None = None) -> str:
    """Error message for a request whose hidden states or logits are NaN or infinite.

    place: index of the token to sample or score, in prompt and answer together.
    """
    remedy = _REMEDIES[dtype]
    if cache_bits is not None:
        remedy += ", or leave out --cache-bits"
    return (
        f"activations are not finite (NaN or infinite) in {dtype} at token {place}, the prompt's "
        f"counted; {remedy}"
    )
