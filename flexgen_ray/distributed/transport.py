"""Channels between stages in different processes, over torch.distributed.

Stages form a ring. Edge r leads from stage r to the next one, and has process groups of two ranks
of its own: one for small messages, and, except on the edge that closes the ring, one for hidden
states. With three stages:

    stage 0  == edge 0: messages, hidden states ==>  stage 1
    stage 1  == edge 1: messages, hidden states ==>  stage 2
    stage 2  -- edge 2: messages (sampled tokens) -->  stage 0

Messages always go over gloo; hidden states over gloo too, or over NCCL if every stage has a GPU.

Calls of a process group block, for ever if the neighbour is lost. So the threads of a stage's
lanes never make such a call themselves, and each waits for something that `close` can end:

- Messages. `post_message` puts a message into a queue; a *message thread* takes it from there and
  writes it to the group. A second message thread reads the group of the edge before, and fills the
  queue that `next_message` takes from.
- Hidden states. `send` posts an empty message, "ready", and hands the tensor to a *tensor thread*,
  which makes the blocking call; `recv` waits for "ready" before it hands over its own tensor. Both
  then wait for a Future, which the tensor thread resolves when the transfer is complete.
- `close` puts None into every queue and fails every Future, which frees the lanes' threads at once.
  A message or tensor thread that takes None ends and drops its group (NCCL's are aborted), so its
  sockets close. The neighbour's blocking calls then raise RuntimeError, and that neighbour closes
  in turn, and so on around the ring, until every thread has ended.

The driver decides how long a stage may wait; groups themselves have no timeout. Knows bytes, not
their meaning.
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

NO_TIMEOUT = timedelta(days=365)  # the driver ends runs that stand still
JOIN_SECONDS = 60
# Far more than any pass needs, so a longer message doesn't come from a stage.
MAX_MESSAGE_BYTES = 256 * 2**20
_SENDER, _RECEIVER = 0, 1  # ranks within an edge's groups
_READY = b""  # the message that precedes hidden states


@dataclass(frozen=True)
class Rendezvous:
    """Address at which the stages of a ring find each other.

    epoch: number of the ring; a stage never meets stages of another epoch. secret: prefix of the
    run's keys in the store, which other processes that reach the store can't guess.
    """

    host: str
    port: int
    epoch: int
    num_stages: int
    uses_nccl: bool = False
    secret: str = ""


class RendezvousStore:
    """Key-value store where stages meet; in the driver's process, so it outlives any stage.

    host: address of the only network interface that the store listens on. secret: random prefix
    for the run's keys (Rendezvous).
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
    """Both ends that one stage has in the ring: to the stage after it and from the one before.

    All stages of a rendezvous construct their channels at the same time.
    rank: number of this stage. host: address of the network interface to listen on.
    Raises RuntimeError if a neighbour doesn't come within JOIN_SECONDS.
    """

    def __init__(self, rendezvous: Rendezvous, rank: int, host: str) -> None:
        self._received: SimpleQueue[bytes | None] = SimpleQueue()
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self._ready: SimpleQueue[bytes | None] = SimpleQueue()
        self._is_closed = False
        self._closed_because = "the stage before has gone, or the run was stopped"
        self.sender = self.receiver = TensorThread(None)
        groups = ProcessGroups(rendezvous, host)
        last = rendezvous.num_stages - 1
        before = (rank - 1) % rendezvous.num_stages
        # A group is complete when both of its ends have made it. Every stage makes those of the
        # lower edge first, or each stage would wait for the next one, in a circle.
        for edge in sorted({before, rank}):
            side = _SENDER if edge == rank else _RECEIVER
            small = groups.make(f"{edge}/small", side, is_hidden=False)
            self._start(self._write if side == _SENDER else self._read, small)
            if edge == last:
                continue
            group = groups.make(f"{edge}/hidden", side, is_hidden=True)
            thread = TensorThread(group, aborts=rendezvous.uses_nccl)
            if side == _SENDER:
                self.sender = thread
            else:
                self.receiver = thread

    def post_message(self, message: bytes) -> None:
        """Send a message to the next stage; returns at once."""
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"a pass needs a message of {len(message):,} bytes to the next stage, and at most "
                f"{MAX_MESSAGE_BYTES:,} are sent; lower gpu_batch_size, or ask for fewer logprobs"
            )
        self._outgoing.put(message)

    def next_message(self) -> bytes:
        """Wait for the next message from the stage before; raises ChannelClosed."""
        return self._take(self._received)

    def send(self, hidden: Tensor) -> None:
        """Send hidden states; returns when they have been taken. Raises ChannelClosed."""
        self.post_message(_READY)
        self.sender.call(lambda group: group.send([_as_bytes(hidden)], _RECEIVER, 0), hidden)

    def recv(self, out: Tensor) -> None:
        """Receive hidden states into `out`; returns when they are there. Raises ChannelClosed."""
        # Without "ready" NCCL's kernel could occupy the device long before its data comes. Whatever
        # waits for the whole device, as the first launch of another kernel may, would wait for that
        # kernel, and so stages could wait for each other in a circle.
        self._take(self._ready)
        self.receiver.call(lambda group: group.recv([_as_bytes(out)], _SENDER, 0), out)

    def close(self) -> None:
        """Free every thread that waits here, and drop the groups, which frees the neighbours."""
        if not self._is_closed:
            self._is_closed = True
            for queue in (self._received, self._outgoing, self._ready):
                queue.put(None)
            self.sender.close()
            self.receiver.close()

    def _take(self, queue: SimpleQueue[bytes | None]) -> bytes:
        message = queue.get()
        if message is None or self._is_closed:
            queue.put(None)  # for the next call
            raise ChannelClosed(self._closed_because)
        return message

    def _start(self, loop: Callable[[Any], None], group: Any) -> None:
        Thread(target=loop, args=(group,), daemon=True, name="small messages").start()

    def _write(self, group: Any) -> None:
        """Message thread to the next stage: each message as its length, then its bytes."""
        try:
            while (message := self._outgoing.get()) is not None:
                group.send([torch.tensor([len(message)])], _RECEIVER, 0).wait()
                if message:
                    data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
                    group.send([data], _RECEIVER, 0).wait()
        except RuntimeError:
            self.close()

    def _read(self, group: Any) -> None:
        """Message thread from the stage before; length 0 is "ready"."""
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
                self._received.put(data.numpy().tobytes())
        except RuntimeError:
            self.close()


class ProcessGroups:
    """Maker of the two-rank process groups of one rendezvous."""

    def __init__(self, rendezvous: Rendezvous, host: str) -> None:
        self._rendezvous = rendezvous
        seconds = timedelta(seconds=JOIN_SECONDS)
        self._store = dist.TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, wait_for_workers=False,
            timeout=seconds,
        )  # fmt: skip
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = seconds
        self._gloo = options

    def make(self, name: str, side: int, is_hidden: bool) -> Any:
        """Make one end of a group, and wait at most JOIN_SECONDS for the other end.

        name: the group's name on both sides. side: 0 to send, 1 to receive. is_hidden: True for
        hidden states, which may go over NCCL. Raises RuntimeError if the other end doesn't come.
        """
        prefix = f"{self._rendezvous.secret}/epoch {self._rendezvous.epoch}/{name}"
        store = dist.PrefixStore(prefix, self._store)
        if is_hidden and self._rendezvous.uses_nccl:
            # Abort only the group when a neighbour is lost; by default NCCL ends the process.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = NO_TIMEOUT
            return dist.ProcessGroupNCCL(store, side, 2, options)
        group = dist.ProcessGroupGloo(store, side, 2, self._gloo)
        group._set_default_timeout(NO_TIMEOUT)
        return group


class TensorThread:
    """Thread that makes a group's blocking calls, so that their caller can stop waiting.

    group: the process group; None for an end that the ring doesn't have. aborts: abort the group on
    `close`. An NCCL kernel would wait for a lost neighbour for ever, and block its whole device.
    """

    def __init__(self, group: Any, aborts: bool = False) -> None:
        self._group_to_abort = group if aborts else None
        self._calls: SimpleQueue[tuple[Callable, Tensor, Future] | None] = SimpleQueue()
        self.pending: Future | None = None
        self._is_closed = False
        if group is not None:
            Thread(target=self._work, args=(group,), daemon=True, name="hidden states").start()

    def call(self, start: Callable[[Any], Any], tensor: Tensor) -> None:
        """Run `start(group)` and wait until the transfer that it started is complete.

        One call at a time. tensor: the tensor that is sent or received. Raises ChannelClosed if the
        neighbour is lost or `close` is called meanwhile.
        """
        self.pending = future = Future[None]()
        self._calls.put((start, tensor, future))
        if self._is_closed:  # `close` may not have seen this future
            self.close()
        future.result()

    def close(self) -> None:
        """Free the caller that waits, end the thread, and abort the group if it needs that."""
        self._is_closed = True
        self._calls.put(None)
        _resolve(self.pending, ChannelClosed("the run was stopped"))
        group, self._group_to_abort = self._group_to_abort, None
        if group is not None:
            # Aborting a group may wait for kernels of another group that is aborted meanwhile.
            Thread(target=group.abort, daemon=True, name="abort").start()

    def _work(self, group: Any) -> None:
        while (call := self._calls.get()) is not None:
            start, tensor, future = call
            try:
                start(group).wait()
                if tensor.is_cuda:
                    torch.cuda.current_stream(tensor.device).synchronize()
                _resolve(future, None)
            except RuntimeError as error:
                _resolve(future, ChannelClosed(f"a neighbouring stage has gone ({error})"))
                return


def _resolve(future: Future | None, error: Exception | None) -> None:
    """Complete a future unless it is complete: `close` and the tensor thread may both try."""
    if future is None or future.done():
        return
    try:
        future.set_exception(error) if error else future.set_result(None)
    except Exception:  # resolved by the other thread since the check
        return


def _as_bytes(tensor: Tensor) -> Tensor:
    """View of a tensor's memory, [bytes] uint8, for groups that don't know every dtype."""
    return tensor.view(torch.uint8).flatten()
