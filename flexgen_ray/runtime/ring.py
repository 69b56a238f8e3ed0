"""Channels between a pipeline's stages, and those within a process.

Stages form a ring, in which two kinds of data travel. Small messages go all the way round, and
sending one never waits: each pass's header (its rows), ahead of its hidden states, and from the
last stage to the first the sampled tokens. Hidden states go from a stage to the next, and sending
them waits until they are taken; since they never go from the last stage to the first, waiting
can't become a deadlock. distributed/transport.py carries the same between processes.
"""

from __future__ import annotations

from queue import SimpleQueue
from threading import Event
from typing import Protocol

from torch import Tensor


class ChannelClosed(ConnectionError):
    """Raised by a channel whose neighbour is gone, or whose run was stopped."""


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
