"""Passes: which rows each brings, decided or told, and what its ops derive from them, once.

Tensors here are made by the lane that uses them, and not before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import isnan

import torch
from torch import Tensor

from flexgen_ray.cost.ops import sampling_share
from flexgen_ray.kernels.attention import length_mask, span
from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.kernels.sampling import NOT_FINITE
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import NO_ROWS, Composition, Row, Rows, decoding_runs
from flexgen_ray.request import Score, SlotScores
from flexgen_ray.runtime.ring import Channel, Header, SampledTokens
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.ops import Op


class Pass(Composition):
    """Rows of a pass, how their next tokens are chosen, and the index tensors its ops use."""

    def __init__(self, header: Header, spare: int, device: torch.device) -> None:
        super().__init__(header.rows, spare)
        self.header = header
        self._device = device

    @cached_property
    def token_ids(self) -> Tensor:
        """[tokens] on the device; the following likewise."""
        return self._indices(list(self.rows.token_ids))

    @cached_property
    def positions(self) -> Tensor:
        return self._indices(self.rows.positions)

    @cached_property
    def last_tokens(self) -> Tensor:
        """[sampled rows] the packed token that each is to be followed after."""
        return self._indices([row.tokens.stop - 1 for row in self.rows.sampled])

    @cached_property
    def prefills(self) -> bool:
        """True if any row brings tokens of a prompt."""
        return any(row.is_prefill for row in self.rows.rows)

    @cached_property
    def slots(self) -> Tensor:
        """[tokens] the slot of each packed token's row."""
        return self._indices(
            [row.slot for row in self.rows.rows for _ in range(row.num_new_tokens)]
        )

    @cached_property
    def new_slots(self) -> Tensor:
        """Slots of the rows that begin with this pass."""
        return self._indices([row.slot for row in self.rows.rows if not row.position])

    @cached_property
    def sampled_slots(self) -> Tensor:
        """[sampled rows]"""
        return self._indices([row.slot for row in self.rows.sampled])

    @cached_property
    def scored_tokens(self) -> Tensor:
        """[scored tokens] the packed token that each follows."""
        scored = self.rows.scored
        return self._indices([row.first + i for row in scored for i in range(len(row.token_ids))])

    @cached_property
    def scored_ids(self) -> Tensor:
        """[scored tokens] which each is."""
        return self._indices([token for row in self.rows.scored for token in row.token_ids])

    @cached_property
    def scores_sampled(self) -> bool:
        """Whether any sampled row's token is to be scored."""
        return any(draw.top is not None for draw in self.header.sampling_rows)

    @cached_property
    def top(self) -> int:
        """Most likeliest tokens that any score is to be told with."""
        tops = [row.top for row in self.rows.scored]
        return max(tops + [draw.top or 0 for draw in self.header.sampling_rows], default=0)

    @cached_property
    def drawn(self) -> float:
        return sum(
            sampling_share(draw.temperature, draw.top_k) for draw in self.header.sampling_rows
        )

    def slot_scores(self, scores: Iterable[Score]) -> SlotScores:
        """Whose they are: those of scored tokens come first, then one of each sampled row, if any
        of these is to be scored."""
        rest = iter(scores)
        told = [(row.slot, list(islice(rest, len(row.token_ids)))) for row in self.rows.scored]
        sampled = zip(self.rows.sampled, self.header.sampling_rows, rest, strict=False)
        return told + [(row.slot, [it]) for row, draw, it in sampled if draw.top is not None]

    def faults(self, token_ids: list[int], scores: SlotScores) -> dict[int, int]:
        """By slot, the place in its sequence of the first token whose logits aren't finite.

        token_ids: chosen for the sampled rows; scores: as slot_scores has them.
        """
        sampled = zip(self.rows.sampled, token_ids, strict=True)
        found = {row.slot: row.seq_len for row, token in sampled if token == NOT_FINITE}
        rows = {row.slot: row for row in self.rows.rows} if self.rows.scored else {}
        for scored, (slot, its) in zip(self.rows.scored, scores, strict=False):
            bad = next((i for i, score in enumerate(its) if isnan(score.logprob)), None)
            if bad is not None:
                row = rows[slot]
                found[slot] = row.position + scored.first - row.offset + 1 + bad
        return found

    def _indices(self, values: list[int]) -> Tensor:
        return place_indices(values, self._device)


class Passes:
    """The passes under way, and what is known of visits: composed here, or, after the first stage,
    as the stage before tells.

    channel: to the neighbours; None for a stage that is the whole model. Its lanes' ops call these
    methods in the order that the schedule's hazards on rows and tokens allow.
    """

    def __init__(self, plan: StagePlan, scheduler: Scheduler, device: torch.device) -> None:
        self.channel: Channel | None = None
        self.ended: int | None = None  # the visit that no other follows, once it is known
        self._plan = plan
        self._scheduler = scheduler
        self._device = device
        self._under_way: dict[tuple[int, int], Pass] = {}
        self._expected: dict[int, Rows] = {}
        self._counts: dict[int, list[int]] = {}
        self._num_empty: dict[int, int] = {}
        self._filled: dict[int, dict[int, int]] = {}  # tokens that each batch's slots hold
        self._last_visit = 0

    @property
    def ring_channel(self) -> Channel:
        """The channel that a stage of several has."""
        assert self.channel is not None, "connect comes first"
        return self.channel

    def begin(self) -> None:
        """A new run, whose visits are counted from 0."""
        self.ended = None
        self._last_visit = 0
        for kept in (self._expected, self._counts, self._num_empty):
            kept.clear()

    def pass_of(self, op: Op) -> Pass:
        """The pass of the op's visit and batch."""
        return self._under_way[op.turn, op.batch]

    def is_empty(self, visit: int) -> bool:
        """True if it is known that no batch of the visit has rows."""
        return self._num_empty.get(visit, 0) == self._plan.policy.num_gpu_batches

    def is_over(self, visit: int) -> bool:
        """Whether the run ends with this visit; asked when that is over."""
        if self.channel is None:
            return self._scheduler.is_done and visit >= self._last_visit
        return self._has_ended(visit + 1)

    def progress(self, visit: int) -> tuple[int, int]:
        """(new tokens, prompt tokens) of a visit that is over; it is then forgotten."""
        new, prefill = self._counts.pop(visit, None) or (0, 0)
        self._num_empty.pop(visit, None)
        return new, prefill

    def compose(self, op: Op) -> None:
        """The first stage decides, and tells the others unless they know that all is over."""
        scheduler, channel = self._scheduler, self.channel
        if channel is not None and self.ended is None and scheduler.is_done:
            self.ended = op.visit
        rows = scheduler.compose(op.batch)
        slots = [row.slot for row in rows.sampled]
        draws, indices = (
            scheduler.sampling_rows(op.batch, slots),
            scheduler.request_indices(op.batch, slots),
        )
        header = Header(op.visit, op.batch, rows, draws, indices, op.visit == self.ended)
        if channel is not None and not self._has_ended(op.visit):
            self._expected[op.batch] = rows
            channel.post_message(header.encode())
        self._begin_pass(op, header)

    def recv_rows(self, op: Op) -> None:
        """A later stage is told, and passes it on."""
        if self._has_ended(op.visit):
            return self._begin_pass(op, Header(op.visit, op.batch, NO_ROWS, [], []))
        message = self.ring_channel.next_message()
        header = Header.decode(message)
        if (header.visit, header.batch) != (op.visit, op.batch):
            raise RuntimeError(f"rows of {header.visit, header.batch} came for {op}")
        if not self._plan.stage.is_last:
            self.ring_channel.post_message(message)
        if header.is_last:
            self.ended = header.visit
        self._begin_pass(op, header)

    def recv_tokens(self, op: Op) -> None:
        """The first stage takes note of what its batch's last visit brought, if it had any rows."""
        rows = self._expected.pop(op.batch, NO_ROWS)
        if rows.num_logits:
            chosen = SampledTokens.decode(self.ring_channel.next_message())
            if chosen.batch != op.batch:
                raise RuntimeError(f"tokens of batch {chosen.batch} came for {op}")
            self._accept(op, rows, chosen)

    def accept(self, op: Op, token_ids: list[int], scores: Iterable[Score]) -> None:
        """What was chosen for the pass's sampled rows, and all scores: noted, or told to the first
        stage."""
        self._last_visit = op.visit
        its = self.pass_of(op)
        found = its.slot_scores(scores)
        faults = its.faults(token_ids, found)
        found = [it for it in found if it[0] not in faults]
        chosen = SampledTokens(op.visit, op.batch, token_ids, found, faults)
        if self.channel is not None:
            self.channel.post_message(chosen.encode())
        else:
            self._accept(op, its.rows, chosen)

    def _accept(self, op: Op, rows: Rows, chosen: SampledTokens) -> None:
        slots = [row.slot for row in rows.sampled]
        self._scheduler.accept(op.batch, slots, chosen.token_ids, chosen.scores, chosen.faults)

    def _has_ended(self, visit: int) -> bool:
        """Whether the run ended before this visit."""
        return self.ended is not None and visit > self.ended

    def _begin_pass(self, op: Op, header: Header) -> None:
        rows, spare = header.rows, self._plan.streamed_rows - 1
        header = replace(header, rows=self._with_stale(op.batch, rows))
        self._under_way[op.turn, op.batch] = Pass(header, spare, self._device)
        counts = self._counts.setdefault(op.visit, [0, 0])
        counts[0] += len(rows.sampled)
        counts[1] += rows.prefill_tokens
        if not rows.rows:
            self._num_empty[op.visit] = self._num_empty.get(op.visit, 0) + 1

    def _with_stale(self, batch: int, rows: Rows) -> Rows:
        """The rows, those that are new to their slots with what an earlier request left there.

        Kept by each stage for itself, over all its runs: a replaced stage's slots are empty.
        """
        filled = self._filled.setdefault(batch, {})
        first = [row for row in rows.rows if not row.position]
        stale = {row.slot: filled.get(row.slot, 0) for row in first}
        filled.update((row.slot, row.seq_len) for row in rows.rows)
        if not any(stale[row.slot] > row.seq_len for row in first):
            return rows
        return replace(
            rows, rows=tuple(replace(row, stale=stale.get(row.slot, 0)) for row in rows.rows)
        )


@dataclass(frozen=True)
class DecodeRows:
    """Decoding rows side by side, both in a cache from place `first` on and among packed tokens.

    seen: the cached tokens that any row attends; lens: of each row, from the first of these on.
    """

    first: int
    count: int
    tokens: slice
    seen: slice
    lens: list[int]
    mask: Tensor | None


def decode_runs(
    placed: list[tuple[Row, int]], most: int, device: torch.device, window: int | None
) -> list[DecodeRows]:
    """Of rows and their places in a cache, `most` rows at a time, in a layer with this window."""
    place = {row.slot: index for row, index in placed}
    found = []
    for run in decoding_runs((row for row, _ in placed if not row.is_prefill), most):
        tokens = slice(run[0].offset, run[0].offset + len(run))
        lens = [row.seq_len for row in run]
        seen, mask = span(lens, window), length_mask(lens, device, window)
        lens = [end - seen.start for end in lens]
        found.append(DecodeRows(place[run[0].slot], len(run), tokens, seen, lens, mask))
    return found
