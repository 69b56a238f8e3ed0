"""Lanes as threads: each runs its ops first in, first out, when what they wait for is done.

Knows threads and failure; not what an op does, nor why it waits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Protocol

import torch

from flexgen_ray.schedule.ops import Lane, Op


class Pending(Protocol):
    """What a lane needs of the executor: how to run an op, and what to do when it is over."""

    def execute(self, index: int, op: Op) -> None: ...
    def fail(self, error: BaseException) -> None: ...


class LaneThreads:
    """One thread a lane, started on entry and joined on exit, whatever happens between.

    threads: how many cores torch may use inside one op of a lane; one where not given.
    """

    def __init__(self, pending: Pending, threads: Mapping[Lane, int]) -> None:
        self._pending = pending
        self._num_threads = torch.get_num_threads()
        self._queues: dict[Lane, SimpleQueue] = {lane: SimpleQueue() for lane in Lane}
        self._threads = [
            threading.Thread(
                target=self._work, args=(lane, threads.get(lane, 1)), name=f"lane {lane}"
            )
            for lane in Lane
        ]

    def submit(self, index: int, op: Op, waits: list[threading.Event]) -> None:
        self._queues[op.lane].put((index, op, waits))

    def __enter__(self) -> LaneThreads:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for queue in self._queues.values():
            queue.put(None)
        for thread in self._threads:
            thread.join()
        torch.set_num_threads(self._num_threads)

    @torch.inference_mode()
    def _work(self, lane: Lane, num_threads: int) -> None:
        # A thread's own number holds only after torch has given it the process's, on first use.
        torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            while (item := self._queues[lane].get()) is not None:
                index, op, waits = item
                for event in waits:
                    event.wait()
                self._pending.execute(index, op)
        except BaseException as error:
            self._pending.fail(error)
