"""Threads that share the tasks of one call with their caller; between calls they sleep.

They aren't OpenMP's, whose threads spin while they wait: beside the threads of host attention, or
of the caller's own team, those would take the cores that others need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

Task = Callable[[], object]


class HostThreads:
    """A number of threads, of which the caller's is one; each uses one core."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(max(count - 1, 1), "host", initializer=_take_one_core)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run all tasks, in any order; raises an error of one of them."""
        # A sequence's iterator gives each task to one thread.
        left = iter(tasks)
        helpers = [self._pool.submit(_drain, left) for _ in range(min(self.count, len(tasks)) - 1)]
        try:
            _drain(left)
        finally:
            for helper in helpers:
                helper.result()


def _take_one_core() -> None:
    # torch gives a thread the process's number on first use, which would undo set_num_threads.
    torch.get_num_threads()
    torch.set_num_threads(1)


@torch.inference_mode()
def _drain(tasks: Iterator[Task]) -> None:
    for task in tasks:
        task()
