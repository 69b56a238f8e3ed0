"""Work that a kernel does on several threads of the CPU at once, each on a share of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def on_threads(work: Callable[[int, int], T], count: int, most: int) -> list[T]:
    """Run work(first, end) on each thread's share of `count` pieces; returns each one's result.

    They are as many as torch's threads, `most` at most. work: releases Python's lock.
    """
    threads = max(1, min(torch.get_num_threads(), most))
    ends = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        return [work(0, count)]
    with ThreadPoolExecutor(threads - 1, "kernel") as pool:
        others = [pool.submit(work, *ends[i : i + 2]) for i in range(1, threads)]
        return [work(*ends[:2]), *(other.result() for other in others)]
