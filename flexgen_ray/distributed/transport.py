"""Links between stages in different processes, over torch.distributed.

Each directed edge of the ring has two-rank groups of its own: gloo for small messages, and for
hidden states gloo, or NCCL where both ends have a GPU to themselves. Whatever blocks in a group is
done by a thread that nobody waits for without end: closing a link drops its groups, which closes
their sockets, which frees whoever blocks at the other end. Knows bytes; not what they mean.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexgen_ray.runtime.ring import ChannelClosed

FOREVER = timedelta(days=365)  # who waits too long is the driver's business
JOIN_SECONDS = 60
# Far more than a pass says; a neighbour that announces more is none.
MAX_MESSAGE_BYTES = 256 * 2**20
_SENDER, _RECEIVER = 0, 1
_READY = b""  # the message before hidden states


@dataclass(frozen=True)
class Rendezvous:
    """Where the stages of a ring find each other.

    epoch: messages of another one are lost. secret: prefix of the run's keys in the store, which
    other processes that reach the store can't guess.
    """

    host: str
    port: int
    epoch: int
    num_stages: int
    uses_nccl: bool = False
    secret: str = ""


class RendezvousStore:
    """The store where stages meet, in the driver's process, so that no stage's end takes it away.

    host: the interface it listens on, and no other. secret: see Meeting.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.secret = secrets.token_hex(16)
        self._socket = socket.socket()
        self._socket.bind((host, 0))
        self._socket.listen()
        self.port: int = self._socket.getsockname()[1]
        self._store = dist.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False,
            master_listen_fd=self._socket.detach(),
        )  # fmt: skip


class GlooChannel:
    """One stage's ends of the ring; made by all stages of a meeting at the same time.

    host: of the interface to listen on. Raises RuntimeError if a neighbour doesn't come.
    """

    def __init__(self, meeting: Rendezvous, rank: int, host: str) -> None:
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        self._posted: SimpleQueue[bytes | None] = SimpleQueue()
        self._ready: SimpleQueue[bytes | None] = SimpleQueue()
        self._is_closed = False
        self._closed_because = "the stage before has gone, or the run was stopped"
        groups = _Groups(meeting, host)
        last = meeting.num_stages - 1
        before = (rank - 1) % meeting.num_stages
        self._sender = self._receiver = _Blocking(None)
        # In the order of the edges, or stages would wait for each other in a circle.
        for edge in sorted({before, rank}):
            side = _SENDER if edge == rank else _RECEIVER
            small = groups.make(f"{edge}/small", side, is_hidden=False)
            self._start(self._write if side == _SENDER else self._read, small)
            if edge == last:
                continue
            group = groups.make(f"{edge}/hidden", side, is_hidden=True)
            hidden = _Blocking(group, aborts=meeting.uses_nccl)
            if side == _SENDER:
                self._sender = hidden
            else:
                self._receiver = hidden

    def post_message(self, message: bytes) -> None:
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"a pass needs a message of {len(message):,} bytes to the next stage, and at most "
                f"{MAX_MESSAGE_BYTES:,} are sent; lower gpu_batch_size, or ask for fewer logprobs"
            )
        self._posted.put(message)

    def next_message(self) -> bytes:
        return self._take(self._messages)

    def send(self, hidden: Tensor) -> None:
        self.post_message(_READY)
        self._sender.call(lambda group: group.send([_bytes(hidden)], _RECEIVER, 0), hidden)

    def recv(self, out: Tensor) -> None:
        # NCCL's kernel would be on the device until they come, and what waits for all of it, as
        # the first use of another kernel may, would wait too: stage for stage, in a circle.
        self._take(self._ready)
        self._receiver.call(lambda group: group.recv([_bytes(out)], _SENDER, 0), out)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            for queue in (self._messages, self._posted, self._ready):
                queue.put(None)
            self._sender.close()
            self._receiver.close()

    def _take(self, queue: SimpleQueue[bytes | None]) -> bytes:
        message = queue.get()
        if message is None or self._is_closed:
            queue.put(None)
            raise ChannelClosed(self._closed_because)
        return message

    def _start(self, loop: Callable[[Any], None], group: Any) -> None:
        Thread(target=loop, args=(group,), daemon=True, name="small messages").start()

    def _write(self, group: Any) -> None:
        try:
            while (message := self._posted.get()) is not None:
                group.send([torch.tensor([len(message)])], _RECEIVER, 0).wait()
                if message:
                    data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
                    group.send([data], _RECEIVER, 0).wait()
        except RuntimeError:
            self.close()

    def _read(self, group: Any) -> None:
        try:
            while not self._is_closed:
                length = torch.zeros(1, dtype=torch.int64)
                group.recv([length], _SENDER, 0).wait()
                if not length:
                    self._ready.put(_READY)
                    continue
                if not 0 < length <= MAX_MESSAGE_BYTES:
                    self._closed_because = (
                        f"the stage before announced a message of {int(length):,} bytes; a pass "
                        f"takes at most {MAX_MESSAGE_BYTES:,}"
                    )
                    return self.close()
                data = torch.empty(int(length), dtype=torch.uint8)
                group.recv([data], _SENDER, 0).wait()
                self._messages.put(data.numpy().tobytes())
        except RuntimeError:
            self.close()


class _Groups:
    """Makes the two-rank groups of one meeting."""

    def __init__(self, meeting: Rendezvous, host: str) -> None:
        self._meeting = meeting
        seconds = timedelta(seconds=JOIN_SECONDS)
        self._store = dist.TCPStore(
            meeting.host, meeting.port, is_master=False, wait_for_workers=False, timeout=seconds
        )
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = seconds
        self._gloo = options

    def make(self, name: str, side: int, is_hidden: bool) -> Any:
        """Waits for the other end, JOIN_SECONDS at most."""
        prefix = f"{self._meeting.secret}/epoch {self._meeting.epoch}/{name}"
        store = dist.PrefixStore(prefix, self._store)
        if is_hidden and self._meeting.uses_nccl:
            # Abort the group when a neighbour is lost; by default it takes its process with it.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = FOREVER
            return dist.ProcessGroupNCCL(store, side, 2, options)
        group = dist.ProcessGroupGloo(store, side, 2, self._gloo)
        group._set_default_timeout(FOREVER)
        return group


class _Blocking:
    """A thread that makes a group's blocking calls, so that their caller can stop waiting.

    aborts: whether closing aborts the group. NCCL's kernels would wait for a lost neighbour for
    ever, and whoever waits for the device with them.
    """

    def __init__(self, group: Any, aborts: bool = False) -> None:
        self._aborts = group if aborts else None
        self._calls: SimpleQueue[tuple[Callable, Tensor, Future] | None] = SimpleQueue()
        self._pending: Future | None = None
        self._is_closed = False
        if group is not None:
            Thread(target=self._work, args=(group,), daemon=True, name="hidden states").start()

    def call(self, start: Callable[[Any], Any], tensor: Tensor) -> None:
        """Returns when what `start` started is over; one call at a time."""
        self._pending = future = Future[None]()
        self._calls.put((start, tensor, future))
        if self._is_closed:
            self.close()
        future.result()

    def close(self) -> None:
        self._is_closed = True
        self._calls.put(None)
        _settle(self._pending, ChannelClosed("the run was stopped"))
        group, self._aborts = self._aborts, None
        if group is not None:
            # Aborting one group may wait for the kernels of another, which is aborted meanwhile.
            Thread(target=group.abort, daemon=True, name="abort").start()

    def _work(self, group: Any) -> None:
        while (call := self._calls.get()) is not None:
            start, tensor, future = call
            try:
                start(group).wait()
                if tensor.is_cuda:
                    torch.cuda.current_stream(tensor.device).synchronize()
                _settle(future, None)
            except RuntimeError as error:
                _settle(future, ChannelClosed(f"a neighbouring stage has gone ({error})"))
                return


def _settle(future: Future | None, error: Exception | None) -> None:
    """Whoever comes second finds it settled."""
    if future is None or future.done():
        return
    try:
        future.set_exception(error) if error else future.set_result(None)
    except Exception:  # settled in between
        return


def _bytes(tensor: Tensor) -> Tensor:
    """Its memory, for groups that don't know every dtype."""
    return tensor.view(torch.uint8).flatten()
