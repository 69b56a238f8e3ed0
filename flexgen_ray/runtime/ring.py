"""Messages between a pipeline's stages, and the channels that carry them within a process.

Stages form a ring, in which two kinds of data travel. Small messages go all the way round, and
sending one never waits: each pass's header (its rows), ahead of its hidden states, and from the
last stage to the first the sampled tokens. Hidden states go from a stage to the next, and sending
them waits until they are taken; since they never go from the last stage to the first, waiting
can't become a deadlock. distributed/transport.py carries the same between processes.
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
    """Raised by a channel whose neighbour is gone, or whose run was stopped."""


@dataclass(frozen=True)
class Header:
    """Rows of one pass of one batch, composed by the first stage.

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
        """Message with the header, JSON lists by position, without what the receiver derives."""
        rows = [_encode_row(row) for row in self.rows.rows]
        sampling = [row.encode() for row in self.sampling_rows]
        fields = [rows, self.rows.prefill_tokens, sampling, self.request_indices, self.is_last]
        if self.rows.scored:
            scored = [(r.slot, r.first, r.token_ids, r.top) for r in self.rows.scored]
            fields.append(scored)
        return json.dumps([self.visit, self.batch, *fields]).encode()

    @staticmethod
    def decode(message: bytes) -> Header:
        """Inverse of encode, except that the rows' token ids stay with the first stage."""
        visit, batch, numbers, prefill, sampling, indices, is_last, *more = json.loads(message)
        rows, offset = [], 0
        for slot, position, count, is_sampled, is_prefill in numbers:
            rows.append(Row(slot, position, count, offset, is_sampled, is_prefill))
            offset += count
        sampling_rows = [SamplingRow.decode(values) for values in sampling]
        scored = tuple(
            ScoredRow(slot, first, tuple(token_ids), top)
            for entries in more
            for slot, first, token_ids, top in entries
        )
        packed = Rows(tuple(rows), (), prefill, scored)
        return Header(visit, batch, packed, sampling_rows, indices, is_last)


def _encode_row(row: Row) -> tuple:
    """Fields of a row without its offset, which the rows before it determine."""
    return row.slot, row.position, row.num_new_tokens, row.is_sampled, row.is_prefill


@dataclass(frozen=True)
class SampledTokens:
    """Tokens that the last stage sampled in a pass, and the scores that were asked for.

    token_ids: in the order of the pass's sampled rows.
    not_finite: {slot: position of the first token whose logits aren't finite}; the token sampled
    for such a slot is void, and its scores are left out.
    """

    visit: int
    batch: int
    token_ids: list[int]
    scores: SlotScores = field(default_factory=list)
    not_finite: dict[int, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Message with the tokens, JSON lists by position, without trailing empty ones."""
        fields: list = [self.visit, self.batch, self.token_ids]
        if self.scores or self.not_finite:
            fields.append(self.scores)
        if self.not_finite:
            fields.append([*self.not_finite.items()])
        return json.dumps(fields).encode()

    @staticmethod
    def decode(message: bytes) -> SampledTokens:
        """Inverse of encode."""
        visit, batch, token_ids, *more = json.loads(message)
        entries, not_finite = (*more, [], [])[:2]
        scores = [(slot, list(map(Score.of, values))) for slot, values in entries]
        return SampledTokens(visit, batch, token_ids, scores, dict(not_finite))


class Channel(Protocol):
    """A stage's connection to the stages before and after it in the ring.

    Calls that wait raise ChannelClosed when nothing more will arrive.
    """

    def post_message(self, message: bytes) -> None:
        """Send a small message to the next stage (after the last, the first); never waits."""

    def next_message(self) -> bytes:
        """Wait for the next small message from the stage before."""

    def send(self, hidden: Tensor) -> None:
        """Send hidden states; returns when the next stage has taken them."""

    def recv(self, out: Tensor) -> None:
        """Fill `out` with the hidden states that the stage before sends."""

    def close(self) -> None:
        """End this stage's waiting, and its neighbours'; from any thread, and more than once."""


class LocalChannel:
    """Channel between stages in one process."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        self._offers: SimpleQueue[tuple[Tensor, Event] | None] = SimpleQueue()
        self._following: LocalChannel = self
        self._preceding: LocalChannel = self
        self._taken = Event()
        self._is_closed = False

    @staticmethod
    def ring(num_stages: int) -> list[LocalChannel]:
        """Connected channels, one for each stage."""
        channels = [LocalChannel() for _ in range(num_stages)]
        for channel, following in zip(channels, channels[1:] + channels[:1], strict=True):
            channel._following, following._preceding = following, channel
        return channels

    def post_message(self, message: bytes) -> None:
        self._following._messages.put(message)

    def next_message(self) -> bytes:
        return self._get(self._messages)

    def send(self, hidden: Tensor) -> None:
        self._taken.clear()
        if self._is_closed:  # close came before there was anything to wait for
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
        item = queue.get()
        if item is None or self._is_closed:
            queue.put(None)  # so that the next call ends too
            raise ChannelClosed("the run was stopped")
        return item
