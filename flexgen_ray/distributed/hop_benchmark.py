"""Measures one hop between two stages: two actors that pass tensors to each other as stages do."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import ray
import torch

from flexgen_ray.distributed.cluster import connect
from flexgen_ray.distributed.driver import node_address
from flexgen_ray.distributed.transport import GlooChannel, Rendezvous, RendezvousStore


def measure_hops(trips: dict[int, int]) -> dict[str, float]:
    """Milliseconds of a hop by size: {bytes of a tensor: median}.

    trips: {bytes of a tensor: number of round trips to time}. Uses the Ray cluster that is
    connected or at RAY_ADDRESS, or starts one.
    """
    own_cluster = connect(None)
    try:
        store = RendezvousStore(node_address())
        rendezvous = Rendezvous(store.host, store.port, 1, 2, secret=store.secret)
        actor: Any = ray.remote(_Stage)
        stages = [actor.options(num_cpus=0.5).remote(rendezvous, rank) for rank in (0, 1)]
        hops = {str(nbytes): _measure_hop(stages, nbytes, n) for nbytes, n in trips.items()}
        for stage in stages:
            ray.kill(stage)
        return hops
    finally:
        if own_cluster is not None:
            own_cluster.close()


class _Stage:
    """One end of a ring of two stages, each the other's neighbour on both sides."""

    def __init__(self, rendezvous: Rendezvous, rank: int) -> None:
        self._channel = GlooChannel(rendezvous, rank, node_address())
        self._rank = rank

    def exchange(self, nbytes: int, rounds: int) -> list[float]:
        """Seconds of each round trip: hidden states one way, a small message back."""
        tensor, seconds = torch.zeros(nbytes, dtype=torch.uint8), []
        for _ in range(rounds):
            started = time.perf_counter()
            if self._rank == 0:
                self._channel.send(tensor)
                self._channel.next_message()
            else:
                self._channel.recv(tensor)
                self._channel.post_message(b"taken")
            seconds.append(time.perf_counter() - started)
        return seconds


def _measure_hop(stages: list[Any], nbytes: int, rounds: int) -> float:
    """Median milliseconds of a round trip of one tensor and the message that answers it."""
    seconds, _ = ray.get([stage.exchange.remote(nbytes, rounds) for stage in stages])
    return round(1e3 * median(seconds), 3)
