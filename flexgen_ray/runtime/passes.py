"""Passes: the rows of each batch in each visit, and the index tensors that its ops share.

The first stage composes a pass; later stages receive its header. A tensor is made when an op first
uses it, in the thread of that op's lane. Knows rows and messages; no layers and no tiers.

A batch of two rows, in a stage that is the whole model. Slot 0 has a prompt of 5 tokens, slot 1 one
of 3, and a pass takes at most 8 tokens of a batch:

    visit 0   rows       (slot 0, position 0, 5 new tokens), (slot 1, position 0, 3 new tokens)
              tokens     packed side by side: 0 1 2 3 4 | 0 1 2          hidden states [8, hidden]
              last_tokens [4, 7]: the head computes logits [2, vocabulary] for these alone
              sampled    one token for each slot, appended to its sequence
    visit 1   rows       (slot 0, position 5, 1 new token), (slot 1, position 3, 1 new token)
              tokens     5 | 3                                           hidden states [2, hidden]
              last_tokens [0, 1]; attention sees 6 and 4 cached tokens, the new ones included

If a prompt doesn't fit, a pass takes a chunk of it, and only the chunk with its last token is
sampled. Decoding rows that lie side by side both in the cache and among the packed tokens form a
run (find_decode_runs), so that one call attends them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import isnan

import numpy as np
import torch
from torch import Tensor

from flexgen_ray.cost.ops import sampling_share
from flexgen_ray.kernels.indices import place_indices
from flexgen_ray.kernels.sampling import NOT_FINITE
from flexgen_ray.layout.pages import PLACES, LayerKind, StagePages, page_table
from flexgen_ray.layout.placement import TokenShare
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.rows import (
    NO_ROWS,
    Composition,
    Division,
    PlacedRows,
    Row,
    Rows,
    decoding_runs,
    streamed_pages_of,
)
from flexgen_ray.models.rope import Rope
from flexgen_ray.models.rotation import rotation
from flexgen_ray.request import Score, SlotScores
from flexgen_ray.runtime.messages import Header, SampledTokens
from flexgen_ray.runtime.ring import Channel
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.ops import Op


class Pass(Composition):
    """Rows of one pass with their homes, their sampling settings, and the index tensors of its ops.

    placed: the rows by where their cache lies, for each kind of layer.
    """

    def __init__(self, header: Header, placed: list[PlacedRows], device: torch.device) -> None:
        super().__init__(header.rows, ())
        self.header = header
        self._placed_rows = placed
        self._device = device
        self._rotations: dict[Rope, Tensor] = {}

    def placed(self, batch: int, kind: LayerKind) -> PlacedRows:
        """The rows by where their cache lies; the pass belongs to one batch."""
        return self._placed_rows[kind.number]

    @cached_property
    def token_ids(self) -> Tensor:
        """Token ids [tokens] on the device, as are all tensors here."""
        return self._indices(list(self.rows.token_ids))

    @cached_property
    def positions(self) -> Tensor:
        """Position in its sequence of each token, [tokens]."""
        return self._indices(self.rows.positions)

    def rotation(self, rope: Rope, head_dim: int, dtype: torch.dtype, tile: slice) -> Tensor:
        """layers.rotation of a tile's tokens, made once for all layers if each row brings one.

        For a prompt's many tokens, they would take memory, and products take far longer.
        """
        if not self.rows.are_single:
            return rotation(rope, self.positions[tile], head_dim, dtype)
        if rope not in self._rotations:
            self._rotations[rope] = rotation(rope, self.positions, head_dim, dtype)
        return self._rotations[rope][:, tile]

    @cached_property
    def last_tokens(self) -> Tensor:
        """Index of the last packed token of each sampled row, [sampled rows]."""
        return self._indices([row.tokens.stop - 1 for row in self.rows.sampled])

    @cached_property
    def prefills(self) -> bool:
        """True if any row brings tokens of a prompt."""
        return any(row.is_prefill for row in self.rows.rows)

    @cached_property
    def slots(self) -> Tensor:
        """Slot of each packed token's row, [tokens]."""
        return self._indices(
            [row.slot for row in self.rows.rows for _ in range(row.num_new_tokens)]
        )

    @cached_property
    def new_slots(self) -> Tensor:
        """Slots of the rows that begin with this pass."""
        return self._indices([row.slot for row in self.rows.rows if not row.position])

    @cached_property
    def users(self) -> tuple[Tensor, Tensor]:
        """Rows that begin with this pass: slot, and first page of each prefix that they share."""
        placed = self._placed_rows[0]
        new = [row for row in self.rows.rows if not row.position]
        pairs = [(row.slot, it.home.pages[0]) for row in new for it in placed.prefixes(row)]
        return self._indices([slot for slot, _ in pairs]), self._indices(
            [page for _, page in pairs]
        )

    def first_pages(self, tier: str) -> tuple[Tensor, Tensor]:
        """Rows on a tier that bring tokens of prompts: slot, and first page."""
        placed = self._placed_rows[0]
        homes = [(row.slot, placed.home(row)) for row in self.rows.rows if row.is_prefill]
        pairs = [(slot, home.pages[0]) for slot, home in homes if home.tier == tier]
        return self._indices([slot for slot, _ in pairs]), self._indices(
            [page for _, page in pairs]
        )

    @cached_property
    def sampled_slots(self) -> Tensor:
        """Slots of the sampled rows, [sampled rows]."""
        return self._indices([row.slot for row in self.rows.sampled])

    @cached_property
    def sampled_prompts(self) -> Tensor:
        """True for each sampled row that brings tokens of its prompt, bool [sampled rows]."""
        return self._indices([int(row.is_prefill) for row in self.rows.sampled]).bool()

    @cached_property
    def scored_tokens(self) -> Tensor:
        """Index of the packed token before each scored token, [scored tokens]."""
        scored = self.rows.scored
        return self._indices([row.first + i for row in scored for i in range(len(row.token_ids))])

    @cached_property
    def scored_ids(self) -> Tensor:
        """Token ids of the scored tokens, [scored tokens]."""
        return self._indices([token for row in self.rows.scored for token in row.token_ids])

    @cached_property
    def scores_sampled(self) -> bool:
        """True if any sampled row's token is to be scored."""
        return any(draw.top is not None for draw in self.header.sampling_rows)

    @cached_property
    def top(self) -> int:
        """Largest number of likeliest tokens that any score is reported with."""
        tops = [row.top for row in self.rows.scored]
        return max(tops + [draw.top or 0 for draw in self.header.sampling_rows], default=0)

    @cached_property
    def drawn(self) -> float:
        """Sampling work, in rows drawn from the whole vocabulary (cost/ops.py)."""
        return sum(
            sampling_share(draw.temperature, draw.top_k) for draw in self.header.sampling_rows
        )

    def slot_scores(self, scores: Iterable[Score]) -> SlotScores:
        """Scores by slot.

        scores: of the scored tokens, row after row; then, if any sampled row is to be scored, one
        of every sampled row.
        """
        rest = iter(scores)
        known = [(row.slot, list(islice(rest, len(row.token_ids)))) for row in self.rows.scored]
        sampled = zip(self.rows.sampled, self.header.sampling_rows, rest, strict=False)
        new = [(row.slot, [score]) for row, draw, score in sampled if draw.top is not None]
        return known + new

    def find_not_finite(self, token_ids: list[int], scores: SlotScores) -> dict[int, int]:
        """Position of the first token whose logits aren't finite, for each slot that has one.

        token_ids: chosen for the sampled rows; scores: from slot_scores.
        """
        sampled = zip(self.rows.sampled, token_ids, strict=True)
        places = {
            row.slot: row.before + row.seq_len for row, token in sampled if token == NOT_FINITE
        }
        rows = {row.slot: row for row in self.rows.rows} if self.rows.scored else {}
        for scored, (slot, values) in zip(self.rows.scored, scores, strict=False):
            bad = next((i for i, score in enumerate(values) if isnan(score.logprob)), None)
            if bad is not None:
                row = rows[slot]
                position = row.before + row.position
                places[slot] = position + scored.first - row.offset + 1 + bad
        return places

    def _indices(self, values: list[int]) -> Tensor:
        return place_indices(values, self._device)


class PartOfBlock(Composition):
    """Passes of several batches whose experts run at once; its rows are those of the first."""

    def __init__(self, passes: list[Pass]) -> None:
        super().__init__(passes[0].rows, ())
        self._tokens = sum(each.rows.num_tokens for each in passes)

    def tokens_of(self, batches: int) -> int:
        """Tokens of all these passes."""
        return self._tokens


class Passes:
    """Passes under way in a stage, and counts of its visits.

    Ops of several lanes call these methods; the schedule's dependencies on rows and tokens order
    the calls.
    number: of the stage in its ring.
    channel: to the neighbours; None for a stage that is the whole model.
    ended: number of the last visit, once it is known.
    """

    def __init__(
        self, plan: StagePlan, scheduler: Scheduler, device: torch.device, number: int = 0
    ) -> None:
        self.channel: Channel | None = None
        self.ended: int | None = None
        self._plan = plan
        self._number = number
        self._scheduler = scheduler
        self._device = device
        self._under_way: dict[tuple[int, int], Pass] = {}
        self._expected: dict[int, Rows] = {}
        self._counts: dict[int, list[int]] = {}
        self._num_empty: dict[int, int] = {}
        self._pages = StagePages(plan.space)
        self._on_host = TokenShare(plan.policy.cpu_attention)
        self._last_visit = 0

    @property
    def ring_channel(self) -> Channel:
        """Channel of a stage that has neighbours."""
        assert self.channel is not None, "connect comes first"
        return self.channel

    def begin(self) -> None:
        """Start a run, whose visits are counted from 0."""
        self.ended = None
        self._last_visit = 0
        self._pages.clear()
        self._on_host = TokenShare(self._plan.policy.cpu_attention)
        for counts in (self._expected, self._counts, self._num_empty):
            counts.clear()

    def pass_of(self, op: Op) -> Pass:
        """Pass of the op's visit and batch."""
        return self._under_way[op.turn, op.batch]

    def part_of(self, op: Op) -> PartOfBlock | None:
        """Passes of all batches that the op works for; None if none of them has rows."""
        first = op.batch - op.batches + 1
        passes = [self._under_way[op.turn, batch] for batch in range(first, op.batch + 1)]
        with_rows = [each for each in passes if each.rows.rows]
        return PartOfBlock(with_rows) if with_rows else None

    def is_empty(self, visit: int) -> bool:
        """True if no batch of the visit has rows, as far as is known."""
        return self._num_empty.get(visit, 0) == self._plan.policy.num_gpu_batches

    def is_over(self, visit: int) -> bool:
        """True if the run ends with this visit, which has ended."""
        if self.channel is None:
            return self._scheduler.is_done and visit >= self._last_visit
        return self._has_ended(visit + 1)

    def take_counts(self, visit: int) -> tuple[int, int, int]:
        """Counts of a visit that has ended, which are cleared.

        Returns the numbers of new tokens, of prompt tokens that were computed, and of those that
        were saved (layout.rows.Rows).
        """
        new, prefill, saved = self._counts.pop(visit, None) or (0, 0, 0)
        self._num_empty.pop(visit, None)
        return new, prefill, saved

    def compose(self, op: Op) -> None:
        """COMPOSE: decide the rows of a pass, and send its header on, in the first stage.

        After the run's last visit nothing is sent, for the other stages have stopped receiving.
        """
        scheduler, channel = self._scheduler, self.channel
        if channel is not None and self.ended is None and scheduler.is_done:
            self.ended = op.visit
        rows = scheduler.compose(op.batch)
        slots = [row.slot for row in rows.sampled]
        sampling = scheduler.sampling_rows(op.batch, slots)
        requests = scheduler.request_indices(op.batch, slots)
        header = Header(op.visit, op.batch, rows, sampling, requests, op.visit == self.ended)
        if channel is not None and not self._has_ended(op.visit):
            self._expected[op.batch] = rows
            channel.post_message(header.encode())
        self._begin_pass(op, header)

    def recv_rows(self, op: Op) -> None:
        """RECV_ROWS: receive a pass's header and send it on, in a later stage."""
        if self._has_ended(op.visit):
            return self._begin_pass(op, Header(op.visit, op.batch, NO_ROWS, [], []))
        message = self.ring_channel.next_message()
        header = Header.decode(message)
        if (header.visit, header.batch) != (op.visit, op.batch):
            raise RuntimeError(f"rows of {header.visit, header.batch} arrived for {op}")
        if not self._plan.stage.is_last:
            self.ring_channel.post_message(message)
        if header.is_last:
            self.ended = header.visit
        self._begin_pass(op, header)

    def recv_tokens(self, op: Op) -> None:
        """RECV_TOKENS: accept the tokens of a batch's last pass, in the first stage."""
        rows = self._expected.pop(op.batch, NO_ROWS)
        if rows.num_logits:
            chosen = SampledTokens.decode(self.ring_channel.next_message())
            if chosen.batch != op.batch:
                raise RuntimeError(f"tokens of batch {chosen.batch} arrived for {op}")
            self._accept(op, rows, chosen)

    def accept(self, op: Op, token_ids: list[int], scores: Iterable[Score]) -> None:
        """ACCEPT: hand a pass's tokens and scores to the scheduler, or send them to stage 0.

        token_ids: of the sampled rows; scores: see Pass.slot_scores.
        """
        self._last_visit = op.visit
        current = self.pass_of(op)
        slot_scores = current.slot_scores(scores)
        not_finite = current.find_not_finite(token_ids, slot_scores)
        slot_scores = [pair for pair in slot_scores if pair[0] not in not_finite]
        chosen = SampledTokens(op.visit, op.batch, token_ids, slot_scores, not_finite)
        if self.channel is not None:
            self.channel.post_message(chosen.encode())
        else:
            self._accept(op, current.rows, chosen)

    def _accept(self, op: Op, rows: Rows, chosen: SampledTokens) -> None:
        slots = [row.slot for row in rows.sampled]
        self._scheduler.accept(op.batch, slots, chosen.token_ids, chosen.scores, chosen.not_finite)

    def _has_ended(self, visit: int) -> bool:
        """True if the run ended before this visit."""
        return self.ended is not None and visit > self.ended

    def _begin_pass(self, op: Op, header: Header) -> None:
        rows = header.rows
        placed = self._place(op.batch, rows)
        self._under_way[op.turn, op.batch] = Pass(header, placed, self._device)
        counts = self._counts.setdefault(op.visit, [0, 0, 0])
        counts[0] += len(rows.sampled)
        counts[1] += rows.prefill_tokens
        counts[2] += rows.saved_tokens
        if not rows.rows:
            self._num_empty[op.visit] = self._num_empty.get(op.visit, 0) + 1

    def _place(self, batch: int, rows: Rows) -> list[PlacedRows]:
        """Take pages back, hand pages out, and divide a pass's rows, for each kind of layer."""
        # A row that comes from another batch may be set back at once.
        for slot, *there in rows.moved:
            self._pages.move((there[0], there[1]), (batch, slot))
        for slot in rows.left:
            self._pages.leave(batch, slot)
        for slot, count in rows.grown:
            self._pages.grow(batch, slot, count)
        for slot, number, tokens in rows.completed:
            self._pages.complete(batch, slot, number, tokens)
        for number in rows.dropped:
            self._pages.drop(number)
        for slot, count, tiers, chain in rows.entered:
            self._pages.enter(batch, slot, count, PLACES[tiers[self._number]], chain)
        homes = [self._pages.homes(batch, row.slot) for row in rows.rows]
        on_host = self._attended_by_host(rows, [each[0].tier for each in homes])
        shared = [self._pages.prefixes(batch, row.slot) for row in rows.rows]
        triples = list(zip(rows.rows, homes, shared, strict=True))
        placed = []
        for kind in self._plan.kinds:
            number = kind.number
            own = ((row.slot in on_host, each[number], of[number]) for row, each, of in triples)
            divisions = [Division(home.tier, takes, home, of) for takes, home, of in own]
            placed.append(PlacedRows(rows, divisions, kind, self._plan.folded_rows))
        return placed

    def _attended_by_host(self, rows: Rows, tiers: list[str]) -> set[int]:
        """Slots of the rows that the host attends where their cache lies; tiers: of each row.

        They are its share of the tokens that rows in its memory attend, and more if the streaming
        slot is too small for the others.
        """
        pairs = list(zip(rows.rows, tiers, strict=True))
        decoding = [row for row, tier in pairs if tier == "cpu" and not row.is_prefill]
        # Sparse rows attend prefixes as their own.
        lens = [row.seq_len + row.before * self._plan.is_sparse for row in decoding]
        chosen = self._on_host.choose([self._plan.attended_tokens(each) for each in lens])
        on_host = {row.slot for row, takes in zip(decoding, chosen, strict=True) if takes}
        if not self._plan.attends_on_host:
            return on_host
        # Rows have the most pages in the first kind of layers.
        room, kind = self._plan.slot_pages, self._plan.kinds[0]
        for row, tier in pairs:
            if tier != "gpu" and (tier == "disk" or row.is_prefill) and row.position:
                room -= streamed_pages_of(row, kind)
        for row in decoding:
            if row.slot not in on_host:
                count = streamed_pages_of(row, kind)
                on_host |= {row.slot} if count > room else set()
                room -= count if count <= room else 0
        return on_host


@dataclass(frozen=True)
class DecodeRows:
    """Run of decoding rows that are neighbours among the packed tokens.

    tokens: their packed tokens; places: among the decoding rows of the pass. tables: int32 [rows,
    pages], their pages in a pool; lens: tokens of each row, with those of folded prefixes;
    num_tokens: int32 [rows], the same numbers. Tensors are on the pool's device.
    """

    tokens: slice
    places: slice
    tables: Tensor
    lens: list[int]
    num_tokens: Tensor


def find_decode_runs(
    placed: PlacedRows, rows: list[Row], table: Callable[[Row], np.ndarray], device: torch.device
) -> list[DecodeRows]:
    """Runs of the decoding rows among some rows of a pass; table: pages of a row."""
    runs = []
    for run in decoding_runs(row for row in rows if not row.is_prefill):
        lens = [placed.length(row) for row in run]
        tokens = slice(run[0].offset, run[0].offset + len(run))
        tables = place_indices(page_table([*map(table, run)]), device, torch.int32)
        num_tokens = place_indices(lens, device, torch.int32)
        first = placed.places[run[0].slot]
        places = slice(first, first + len(run))
        runs.append(DecodeRows(tokens, places, tables, lens, num_tokens))
    return runs
