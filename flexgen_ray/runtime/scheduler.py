"""Which request sits in which slot, what each pass brings, and when a request is done.

The batches of all blocks in flight have up to gpu_batch_size slots each. Requests are sorted by
prompt length so that a batch's rows are alike. A finished row leaves its slot, and a waiting
request takes it at the batch's next pass. Knows tokens; no tensors, no tiers.

Names the numbers that leave a dtype: why, and what to do. Knows names; no tensors.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from flexgen_ray.kernels.sampling import Penalties, SamplingRow, uniform_number
from flexgen_ray.layout.rows import Row, Rows, ScoredRow
from flexgen_ray.request import Finished, Request, SamplingParams, Score, SlotScores

_WIDER = {
    "float16": "use --dtype bfloat16 or float32",
    "bfloat16": "use --dtype float32",
    "float32": "its weights may be damaged, or the prompt be one that they can't take",
}


def not_finite_message(place: int, dtype: str = "float32", cache_bits: int | None = None) -> str:
    """The sentence for a request of which hidden states or logits are NaN or infinite.

    place: of the token that was to be chosen or scored, in the prompt and the answer together.
    """
    remedy = _WIDER[dtype]
    if cache_bits is not None:
        remedy += ", or leave out --cache-bits"
    return (
        f"activations are not finite (NaN or infinite) in {dtype} at token {place}, the prompt's "
        f"counted; {remedy}"
    )


FindStop = Callable[[list[int], int, SamplingParams], str | None]


@dataclass
class _Sequence:
    """A request in a slot: its tokens, how many of them were known when it came, and how many the
    cache holds. counts: how often its answer has each token."""

    request: Request
    token_ids: list[int]
    scores: list[Score]
    num_known: int
    cached: int = 0
    counts: Counter[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = Counter(self.generated)

    def append(self, token: int) -> None:
        self.token_ids.append(token)
        self.counts[token] += 1

    @cached_property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The distinct ones."""
        return tuple(sorted(set(self.request.prompt_token_ids)))

    @property
    def generated(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_token_ids) :]

    def scored(self, row: Row) -> ScoredRow | None:
        """What is known to follow the row's tokens and has no score yet."""
        request = self.request
        if request.scored_from is None:
            return None
        position = max(row.position + 1, request.scored_from + len(request.scores))
        token_ids = self.token_ids[position : row.seq_len + 1]
        first = row.offset + position - row.position - 1
        return ScoredRow(row.slot, first, tuple(token_ids), request.top) if token_ids else None


@dataclass
class Scheduler:
    """Feeds one stage with passes.

    cell_tokens: most tokens of one batch in one pass; find_stop(token ids, first of the answer,
    params): the stop string that the last token completes; seed: of requests without one.
    """

    gpu_batch_size: int
    num_batches: int
    cell_tokens: int
    eos_token_ids: frozenset[int]
    find_stop: FindStop | None = None
    seed: int = 0
    explain: Callable[[int], str] = not_finite_message
    _waiting: deque[Request] = field(default_factory=deque)
    _finished: deque[Finished] = field(default_factory=deque)
    _accepted: deque[tuple[int, int]] = field(default_factory=deque)
    _scored: deque[tuple[int, list[Score]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._slots: list[dict[int, _Sequence]] = [{} for _ in range(self.num_batches)]

    def clear(self) -> None:
        """Forgets what a run that was cut short left behind."""
        for queue in (self._waiting, self._finished, self._accepted, self._scored):
            queue.clear()
        for slots in self._slots:
            slots.clear()

    def add(self, requests: Iterable[Request]) -> None:
        """Queues requests, longest prompts first, so what takes most memory is met at once."""
        merged = [*self._waiting, *requests]
        merged.sort(key=lambda it: (-len(it.prompt_token_ids + it.generated), -it.max_seq_len))
        self._waiting = deque(merged)

    @property
    def is_done(self) -> bool:
        """True if no pass will have rows any more; from another thread too."""
        return not self._waiting and not any(self._slots)

    def compose(self, batch: int) -> Rows:
        """The next pass of a batch: each decoding row's token, then prompts as far as they fit.

        Prompts are served first come, first served, so that at most one is ever half done.
        """
        slots = self._slots[batch]
        self._fill(slots)
        decoding = [s for s, seq in slots.items() if len(seq.token_ids) - seq.cached == 1]
        room = self.cell_tokens - len(decoding)
        counts = dict.fromkeys(decoding, 1)
        for slot, sequence in slots.items():
            if slot not in counts:
                count = min(room, len(sequence.token_ids) - sequence.cached)
                room -= count
                if count:
                    counts[slot] = count
        return self._pack(slots, counts)

    def sampling_rows(self, batch: int, slots: list[int]) -> list[SamplingRow]:
        """How to choose the next token of each slot."""
        return [self._sampling_row(self._slots[batch][slot]) for slot in slots]

    def request_indices(self, batch: int, slots: list[int]) -> list[int]:
        return [self._slots[batch][slot].request.index for slot in slots]

    def accept(
        self,
        batch: int,
        slots: list[int],
        token_ids: list[int],
        scores: SlotScores | None = None,
        faults: dict[int, int] | None = None,
    ) -> None:
        """Appends the chosen tokens, and scores; finished requests leave their slots.

        faults: as of runtime.link.Chosen; those requests fail.
        """
        faults = faults or {}
        for slot, place in faults.items():
            index = self._slots[batch][slot].request.index
            self._finished.append(Finished(index, [], "error", error=self.explain(place)))
            del self._slots[batch][slot]
        told = [(self._slots[batch][slot], found) for slot, found in scores or ()]
        for sequence, found in told:
            sequence.scores += found
        for slot, token in zip(slots, token_ids, strict=True):
            if slot in faults:
                continue
            sequence = self._slots[batch][slot]
            sequence.append(token)
            self._accepted.append((sequence.request.index, token))
            done = self._finished_by(sequence, token)
            if done is not None:
                self._finished.append(done)
                del self._slots[batch][slot]
        self._scored.extend((sequence.request.index, found) for sequence, found in told)

    def take_finished(self) -> Iterator[Finished]:
        """What finished since the last call; from another thread than `accept`'s, if one likes."""
        while self._finished:
            yield self._finished.popleft()

    def take_accepted(self) -> Iterator[tuple[int, int]]:
        """(request, token) of each token since the last call; likewise."""
        while self._accepted:
            yield self._accepted.popleft()

    def take_scored(self) -> Iterator[tuple[int, list[Score]]]:
        """(request, its next scores) since the last call; called before `take_accepted`, it tells
        of none that isn't told there."""
        while self._scored:
            yield self._scored.popleft()

    def _fill(self, slots: dict[int, _Sequence]) -> None:
        """Waiting requests into free slots; when few are left, each batch gets its share."""
        left = len(self._waiting) + sum(map(len, self._slots))
        room = min(self.gpu_batch_size, -(-left // self.num_batches)) - len(slots)
        free = (slot for slot in range(self.gpu_batch_size) if slot not in slots)
        for slot in list(islice(free, max(0, min(room, len(self._waiting))))):
            request = self._waiting[0]
            tokens = request.prompt_token_ids + request.generated
            slots[slot] = _Sequence(request, tokens, [*request.scores], len(tokens))
            # Only now, or `is_done` would be true in between.
            self._waiting.popleft()

    def _pack(self, slots: dict[int, _Sequence], counts: dict[int, int]) -> Rows:
        rows: list[Row] = []
        token_ids: list[int] = []
        scored: list[ScoredRow] = []
        prefill_tokens = 0
        for slot in sorted(counts):
            sequence, count = slots[slot], counts[slot]
            start, stop = sequence.cached, sequence.cached + count
            is_last = stop == len(sequence.token_ids)
            row = Row(slot, start, count, len(token_ids), is_last, start < sequence.num_known)
            rows.append(row)
            scored += filter(None, [sequence.scored(row)])
            token_ids += sequence.token_ids[start:stop]
            if start < len(sequence.request.prompt_token_ids):
                prefill_tokens += count
            sequence.cached = stop
        return Rows(tuple(rows), tuple(token_ids), prefill_tokens, tuple(scored))

    def _sampling_row(self, sequence: _Sequence) -> SamplingRow:
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
            max(params.top_k, 0),
            params.min_p,
            self._banned(sequence),
            _penalties(sequence) if params.has_penalties else None,
            params.allowed_token_ids,
            tuple(params.logit_bias.items()) if params.logit_bias else (),
        )

    def _banned(self, sequence: _Sequence) -> tuple[int, ...]:
        """Ends before min_tokens, and the last tokens of bad words whose others precede it."""
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

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end an answer."""
        ends = frozenset(params.stop_token_ids)
        return ends if params.ignore_eos else ends | self.eos_token_ids

    def _finished_by(self, sequence: _Sequence, token: int) -> Finished | None:
        """The request's end, if the newest token is its last."""
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

    def _newest_stop(self, sequence: _Sequence, count: int) -> str | None:
        """The stop string that the newest token completes."""
        request, params = sequence.request, sequence.request.params
        if not params.stop or count <= params.min_tokens:
            return None
        assert self.find_stop is not None, "stop strings need a tokenizer"
        begin = len(request.prompt_token_ids) + len(request.forced_token_ids)
        return self.find_stop(sequence.token_ids, begin, params)


def _penalties(sequence: _Sequence) -> Penalties:
    params = sequence.request.params
    return Penalties(
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        sequence.prompt_tokens if params.repetition_penalty != 1 else (),
        tuple(sequence.counts.items()),
    )
