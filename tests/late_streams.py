"""CUDA as far as it orders work, on the CPU: streams whose ops run as late as events permit, or as
early, so that a missing wait shows up as wrong tokens.

An op of a lane on a stream is only queued when it is launched. It runs when a host thread waits for
an event behind it; on the streams that are `eager`, as soon as the events that it waits for have
passed. Ops run whole: memory that one op's kernels share is in one stream's order anyway.

Memory that no buffer of the schedule names has no event. So `StreamWatch` sees to the rest: a
tensor that an op makes is used on the lane that made it, on whose stream the allocator will give
its memory away again. Copies between the tiers are cut into pieces, as on a GPU.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen_ray import LLM
from flexgen_ray.runtime import lanes, stage
from flexgen_ray.runtime.handlers import HANDLERS, OpHandlers
from flexgen_ray.schedule.ops import ON_STREAMS, Lane, Op
from flexgen_ray.store import link
from flexgen_ray.store.memory import MemoryTier

CUDA = torch.device("cuda")
LATE_SECONDS = 1e-3
PIECE = 512  # bytes, so that tiny models' copies are cut too


class LateCuda:
    """Stands for torch.cuda; `eager` are the lanes whose streams run ahead, `slow` is a worker
    whose thread begins each op late; `watch`, if there is one, sees what runs on streams.

    ignores: waits that are left out, to see whether they are missed: those of streams
    ("wait_event"), or those of host threads ("synchronize").
    """

    def __init__(
        self,
        eager: Collection[Lane] = (),
        slow: Lane | None = None,
        ignores: Collection[str] = (),
        watch: StreamWatch | None = None,
    ) -> None:
        self.eager = eager
        self.slow = slow
        self.ignores = ignores
        self.watch = watch
        self._tiers: list[tuple[int, int, str]] = []  # first and last address of a tier's memory
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
            if op.lane in ON_STREAMS:
                stream = getattr(cuda._of_thread, "stream", default)
                stream.lane = op.lane
                stream.push(act if cuda.watch is None else partial(cuda.watch.run, op, act))
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
        patch(link, "crosses_link", self.crosses_link)
        patch(link, "COPY_PIECE", PIECE)
        allocate = MemoryTier.allocate

        def noted(tier: MemoryTier, what: str, nbytes: int) -> Tensor:
            memory = allocate(tier, what, nbytes)
            self._tiers.append((memory.data_ptr(), memory.data_ptr() + nbytes, tier.name))
            return memory

        patch(MemoryTier, "allocate", noted)

    def crosses_link(self, target: Tensor, source: Tensor) -> bool:
        """True between the GPU tier and the CPU tier; memory of no tier crosses no link."""
        return {self._tier_of(target), self._tier_of(source)} == {"gpu", "cpu"}

    def _tier_of(self, tensor: Tensor) -> str | None:
        at = tensor.data_ptr()
        return next((tier for first, last, tier in self._tiers if first <= at < last), None)

    def synchronize(self) -> None:
        if "synchronize" not in self.ignores:
            with self._lock:
                for stream in list(self._streams):
                    stream.finish()

    def progress(self) -> None:
        """What runs ahead does, as far as it may."""
        with self._lock:
            while any(it.lane in self.eager and it.advance() for it in list(self._streams)):
                pass


class _Stream:
    """A queue of acts, and of events that are waited for or recorded."""

    def __init__(self, cuda: LateCuda, is_default: bool = False) -> None:
        self.lane: Lane | None = None
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


class StreamWatch(TorchDispatchMode):
    """Sees the tensors that ops on streams make, use and copy; `faults` says what must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()
        self._op: Op | None = None
        # Kept, so that no address is used twice: {address: (storage, lane that made it)}.
        self._made: dict[int, tuple[torch.UntypedStorage, Lane]] = {}

    def run(self, op: Op, act: Callable[[], None]) -> None:
        """Run an op; one at a time."""
        self._op = op
        with self:
            act()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert self._op is not None
        lane, known = self._op.lane, set()
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            address = tensor.untyped_storage().data_ptr()
            known.add(address)
            if self._made.get(address, (None, lane))[1] is not lane:
                other = self._made[address][1]
                self.faults.add(f"{self._op.kind} of {lane} uses what {other} made")
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:  # of torch.tensor, which made it just now
            known.clear()
        for tensor in _tensors((result,)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                self._made[storage.data_ptr()] = storage, lane
        return result


def _tensors(values: Iterable) -> Iterator[Tensor]:
    """Tensors that have memory: all others would look alike, for their address is 0."""
    for value in values:
        if isinstance(value, Tensor):
            if value.untyped_storage().nbytes():
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
