"""CUDA as far as it orders work, on the CPU: streams whose ops run as late as events permit, or as
early, so that a missing wait shows up as wrong tokens.

An op of a lane on a stream is only queued when it is launched. It runs when a host thread waits for
an event behind it; on the streams that are `eager`, as soon as the events that it waits for have
passed. Ops run whole: memory that one op's kernels share is in one stream's order anyway.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import partial

import torch

from flexgen_ray import LLM
from flexgen_ray.runtime import lanes, stage
from flexgen_ray.runtime.handlers import HANDLERS, OpHandlers
from flexgen_ray.schedule.ops import Lane

CUDA = torch.device("cuda")
LATE_SECONDS = 1e-3


class LateCuda:
    """Stands for torch.cuda; `eager` are the workers whose streams run ahead, `slow` is one whose
    thread begins each op late.

    ignores: waits that are left out, to see whether they are missed: those of streams
    ("wait_event"), or those of host threads ("synchronize").
    """

    def __init__(
        self,
        eager: Collection[Lane] = (),
        slow: Lane | None = None,
        ignores: Collection[str] = (),
    ) -> None:
        self.eager = eager
        self.slow = slow
        self.ignores = ignores
        self._lock = threading.RLock()
        self._streams: list[_Stream] = []
        self._of_thread = threading.local()

    def install(self, monkeypatch) -> None:
        """Until the patches end."""
        cuda = self
        default = _Stream(cuda, is_default=True)

        def run(handlers: OpHandlers, op, ready_at: float = 0.0) -> None:
            # What there is to do is known at the launch; how it is done, when it runs.
            if handlers.is_idle(op):
                return
            act = partial(HANDLERS[op.kind], handlers, op)
            if op.lane.worker in lanes.ON_STREAMS:
                stream = getattr(cuda._of_thread, "stream", default)
                stream.worker = op.lane.worker
                stream.push(act)
            else:
                if op.lane.worker is cuda.slow:
                    time.sleep(LATE_SECONDS)
                act()

        patch = monkeypatch.setattr
        patch(OpHandlers, "run", run)
        patch(torch.cuda, "Stream", lambda device=None: _Stream(cuda))
        patch(torch.cuda, "Event", lambda **options: _Event(cuda))
        patch(torch.cuda, "set_stream", lambda it: setattr(cuda._of_thread, "stream", it))
        patch(torch.cuda, "synchronize", lambda device=None: cuda.synchronize())
        patch(stage, "make_lane_workers", lambda device, *of: lanes.make_lane_workers(CUDA, *of))
        patch(stage, "device_wait", lambda device: lanes.device_wait(CUDA))
        patch(LLM, "_stages_disk", True)

    def synchronize(self) -> None:
        if "synchronize" not in self.ignores:
            with self._lock:
                for stream in list(self._streams):
                    stream.finish()

    def progress(self) -> None:
        """What runs ahead does, as far as it may."""
        with self._lock:
            while any(it.worker in self.eager and it.advance() for it in list(self._streams)):
                pass


class _Stream:
    """A queue of acts, and of events that are waited for or recorded."""

    def __init__(self, cuda: LateCuda, is_default: bool = False) -> None:
        self.worker: Lane | None = None
        self._cuda = cuda
        self._queue: deque[Callable[[], None] | _Event] = deque()
        cuda._streams.append(self)

    def push(self, item: Callable[[], None] | _Event) -> None:
        with self._cuda._lock:
            self._queue.append(item)
        self._cuda.progress()

    def wait_event(self, event: _Event) -> None:
        if "wait_event" not in self._cuda.ignores:
            self.push(event)

    def synchronize(self) -> None:
        with self._cuda._lock:
            self.finish()

    def advance(self) -> bool:
        """Runs the next item, unless it is an event that has yet to come."""
        if not self._queue:
            return False
        item = self._queue[0]
        if isinstance(item, _Event) and not item.has_come:
            return False
        self._queue.popleft()
        if not isinstance(item, _Event):
            with torch.inference_mode():
                item()
        return True

    def finish(self, until: _Event | None = None) -> None:
        """All that is queued, or what is before an event, and what that waits for."""
        while self._queue and not (until is not None and until.has_come):
            item = self._queue[0]
            if isinstance(item, _Event) and not item.has_come:
                item.force()
            else:
                self.advance()


class _Event:
    """Recorded once."""

    def __init__(self, cuda: LateCuda) -> None:
        self._cuda = cuda
        self._stream: _Stream | None = None
        self.has_come = False
        self.time = 0.0

    def record(self, stream: _Stream) -> None:
        self._stream = stream
        stream.push(self._come)

    def synchronize(self) -> None:
        if "synchronize" not in self._cuda.ignores:
            with self._cuda._lock:
                self.force()

    def query(self) -> bool:
        return self.has_come

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3

    def force(self) -> None:
        assert self._stream is not None, "waits for an event that nobody recorded"
        self._stream.finish(self)

    def _come(self) -> None:
        self.has_come, self.time = True, time.perf_counter()
