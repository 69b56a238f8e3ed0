"""Which thread serves which lanes, and with how many cores. Knows the machine; no ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from flexgen_ray.runtime.lanes import Crew
from flexgen_ray.schedule.ops import Lane

ON_STREAMS = frozenset(
    {Lane.DEVICE, Lane.LOAD_WEIGHTS, Lane.LOAD_CACHE, Lane.LOAD_SMALL, Lane.STORE}
)


@dataclass(frozen=True)
class Cores:
    """A machine's cores, as they are divided: for the device's maths (if the device is the CPU),
    and for host attention. Copies and disk requests take one each, and mostly wait."""

    total: int
    device: int
    host: int

    def seconds(self, lanes: dict[str, float]) -> float:
        """Of all cores, for so many seconds of each lane; the disk's requests take none."""
        taken = {Lane.DEVICE: self.device, Lane.HOST: self.host}
        idle = (Lane.DISK_READ, Lane.DISK_WRITE)
        work = sum(taken.get(Lane(lane), 1) * it for lane, it in lanes.items() if lane not in idle)
        return work / self.total


def divide_cores(num_threads: int, on_cuda: bool, attends_on_host: bool) -> Cores:
    """The same for every executor, for results may depend on it.

    Without host attention the device has all. With CUDA it needs one core to be issued to, and
    copies another.
    """
    if on_cuda:
        return Cores(num_threads, num_threads, num_threads)
    host = max(1, num_threads // 4) if attends_on_host else 0
    # Of two or three cores none can be spared: measured, sharing them is faster.
    device = num_threads - host if num_threads >= 4 else num_threads
    return Cores(num_threads, device, max(1, host))


def make_crews(device: torch.device, cores: Cores, attends_by_torch: bool = False) -> list[Crew]:
    """A thread a worker; with CUDA one thread for all streams, one of which a worker has.

    To be made once: each stream that has multiplied keeps a workspace, and what it has freed.
    attends_by_torch: host attention takes torch's threads; else they would only be in the way.
    """
    served = {it: tuple(lane for lane in Lane if lane.worker is it) for it in Lane}
    served = {worker: lanes for worker, lanes in served.items() if lanes}
    threads = {Lane.DEVICE: cores.device, Lane.HOST: cores.host if attends_by_torch else 1}
    if device.type != "cuda":
        return [Crew(lanes, threads.get(worker, 1)) for worker, lanes in served.items()]
    stream_of = {worker: torch.cuda.Stream(device) for worker in ON_STREAMS}
    streams = {lane: stream for it, stream in stream_of.items() for lane in served[it]}
    others = [
        Crew(lanes, threads.get(worker, 1))
        for worker, lanes in served.items()
        if worker not in ON_STREAMS
    ]
    return [Crew(tuple(streams), 1, streams), *others]


def device_wait(device: torch.device) -> Callable[[], None] | None:
    """What returns when the device has done all that it was given; a CPU has done it at once."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
