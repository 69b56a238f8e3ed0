"""Sequence of a request in a slot: its tokens, scores and penalties so far.

Knows one request; neither batches nor passes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from flexgen_ray.kernels.sampling import Penalties
from flexgen_ray.layout.rows import Row, ScoredRow
from flexgen_ray.request import Request, Score
from flexgen_ray.runtime.prefixes import Prefix


@dataclass
class Sequence:
    """A request in a slot.

    token_ids: of prompt and answer; num_known: number of tokens when it took the slot; age: number
    of sequences that entered before.
    cached: number of tokens in the cache, or on their way there.
    num_tokens: those for which the cache needed room when its batch was composed last.
    expected_tokens: those that it is expected to end with; 0 for the most.
    prefix: the deepest one that precedes its own tokens, which alone these two numbers count.
    is_prefix: True if it is itself a prefix that is computed for others.
    counts: occurrences of each token in its answer.
    """

    request: Request
    token_ids: list[int]
    scores: list[Score]
    num_known: int
    age: int = 0
    cached: int = 0
    expected_tokens: int = 0
    num_tokens: int = 0
    prefix: Prefix | None = None
    is_prefix: bool = False
    counts: Counter[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = Counter(self.generated)
        self.expected_tokens = self.expected_tokens or self.final_tokens
        self.num_tokens = len(self.token_ids) - self.before
        self.cached = max(self.cached, self.before)

    def append(self, token: int) -> None:
        """Add a token to the answer."""
        self.token_ids.append(token)
        self.counts[token] += 1

    @property
    def before(self) -> int:
        """Tokens of prefixes that precede its own."""
        return self.prefix.end if self.prefix else 0

    @property
    def final_tokens(self) -> int:
        """Most tokens of its own that it ends with."""
        return self.request.max_seq_len - self.before

    @cached_property
    def prompt_tokens(self) -> tuple[int, ...]:
        """Distinct tokens of the prompt."""
        return tuple(sorted(set(self.request.prompt_token_ids)))

    @property
    def generated(self) -> list[int]:
        """Ids of the answer's tokens so far."""
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    def scored(self, row: Row) -> ScoredRow | None:
        """Known tokens that follow the row's tokens and have no score yet, if any."""
        request = self.request
        if request.scored_from is None:
            return None
        position = max(row.before + row.position + 1, request.scored_from + len(request.scores))
        token_ids = self.token_ids[position : row.before + row.seq_len + 1]
        first = row.offset + position - row.before - row.position - 1
        return ScoredRow(row.slot, first, tuple(token_ids), request.top) if token_ids else None

    def penalties(self) -> Penalties:
        """Penalties on the tokens so far."""
        params = self.request.params
        return Penalties(
            params.presence_penalty,
            params.frequency_penalty,
            float(params.repetition_penalty),  # could be an integer of more than 64 bits
            self.prompt_tokens if params.repetition_penalty != 1 else (),
            tuple(self.counts.items()),
        )
