"""A stage's ends of the ring: what it hears from the stage before, and tells the one after.

Two kinds of things travel. Small messages go round the whole ring and never wait for room: the rows
of each pass, ahead of its hidden states, and from the last stage to the first the tokens it chose.
Hidden states go from stage to stage and wait until they are taken; since they never close the ring,
waiting can't become a deadlock. Knows messages; not how they are carried.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import Protocol

from torch import Tensor

from flexgen_ray.kernels.sampling import SamplingRow
from flexgen_ray.layout.rows import Row, Rows, ScoredRow
from flexgen_ray.request import Score, SlotScores


class ChannelClosed(ConnectionError):
    """A neighbour has gone, or this stage's own run was stopped."""


@dataclass(frozen=True)
class Header:
    """One pass of one batch, as the first stage composed it.

    sampling_rows: for each sampled row, settings that choose its next token.
    request_indices: for each sampled row, the index of its request.
    is_last: True if no visit follows this one.
    """

    visit: int
    batch: int
    rows: Rows
    sampling_rows: list[SamplingRow]
    request_indices: list[int]
    is_last: bool = False

    def encode(self) -> bytes:
        rows = [_told(row) for row in self.rows.rows]
        draws = [draw.encode() for draw in self.sampling_rows]
        told = [rows, self.rows.prefill_tokens, draws, self.request_indices, self.is_last]
        if self.rows.scored:
            scored = [(r.slot, r.first, r.token_ids, r.top) for r in self.rows.scored]
            told.append(scored)
        return json.dumps([self.visit, self.batch, *told]).encode()

    @staticmethod
    def decode(message: bytes) -> Header:
        visit, batch, numbers, prefill, draws, indices, is_last, *more = json.loads(message)
        rows, offset = [], 0
        for slot, position, count, is_sampled, is_prefill in numbers:
            rows.append(Row(slot, position, count, offset, is_sampled, is_prefill))
            offset += count
        found = [SamplingRow.decode(draw) for draw in draws]
        scored = tuple(
            ScoredRow(slot, first, tuple(token_ids), top)
            for told in more
            for slot, first, token_ids, top in told
        )
        packed = Rows(tuple(rows), (), prefill, scored)
        return Header(visit, batch, packed, found, indices, is_last)


def _told(row: Row) -> tuple:
    """Without what follows from the rows before it."""
    return row.slot, row.position, row.num_new_tokens, row.is_sampled, row.is_prefill


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that the last stage chose in a pass, in the order of its sampled rows, and the
    scores that were asked for.

    faults: by slot, the place in its sequence of the first token whose logits aren't finite; what
    was chosen for it is void, and its scores are left out.
    """

    visit: int
    batch: int
    token_ids: list[int]
    scores: SlotScores = field(default_factory=list)
    faults: dict[int, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        told: list = [self.visit, self.batch, self.token_ids]
        if self.scores or self.faults:
            told.append(self.scores)
        if self.faults:
            told.append([*self.faults.items()])
        return json.dumps(told).encode()

    @staticmethod
    def decode(message: bytes) -> SampledTokens:
        visit, batch, token_ids, *more = json.loads(message)
        told, faults = (*more, [], [])[:2]
        scores = [(slot, list(map(Score.of, found))) for slot, found in told]
        return SampledTokens(visit, batch, token_ids, scores, dict(faults))


class Channel(Protocol):
    """Every call that waits raises LinkClosed when there is nothing more to wait for."""

    def post_message(self, message: bytes) -> None:
        """A small message to the next stage, from the last one to the first; doesn't wait."""

    def next_message(self) -> bytes:
        """Waits for the next small message."""

    def send(self, hidden: Tensor) -> None:
        """Returns when the next stage has taken these hidden states."""

    def recv(self, out: Tensor) -> None:
        """Fills `out` with what the stage before sends."""

    def close(self) -> None:
        """Ends this stage's waiting, and its neighbours', from any thread; may be called twice."""


class LocalChannel:
    """Of stages in one process."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        self._offers: SimpleQueue[tuple[Tensor, Event] | None] = SimpleQueue()
        self._following: LocalChannel = self
        self._preceding: LocalChannel = self
        self._taken = Event()
        self._is_closed = False

    @staticmethod
    def ring(num_stages: int) -> list[LocalChannel]:
        """One for each stage, joined up."""
        links = [LocalChannel() for _ in range(num_stages)]
        for link, following in zip(links, links[1:] + links[:1], strict=True):
            link._following, following._preceding = following, link
        return links

    def post_message(self, message: bytes) -> None:
        self._following._messages.put(message)

    def next_message(self) -> bytes:
        return self._get(self._messages)

    def send(self, hidden: Tensor) -> None:
        self._taken.clear()
        if self._is_closed:  # before it could be waited for
            raise ChannelClosed("the run was stopped")
        self._following._offers.put((hidden, self._taken))
        self._taken.wait()
        if self._is_closed:
            raise ChannelClosed("the run was stopped")

    def recv(self, out: Tensor) -> None:
        hidden, taken = self._get(self._offers)
        out.copy_(hidden)
        taken.set()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._messages.put(None)
            self._offers.put(None)
            self._taken.set()
            self._following.close()
            self._preceding.close()

    def _get(self, queue: SimpleQueue):
        found = queue.get()
        if found is None or self._is_closed:
            queue.put(None)  # for whoever asks again
            raise ChannelClosed("the run was stopped")
        return found
