"""Two actors that pass tensors to and fro as stages do, to see what a hop costs."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import ray
import torch

from flexgen_ray.distributed.cluster import connect
from flexgen_ray.distributed.driver import node_address
from flexgen_ray.distributed.transport import GlooChannel, Rendezvous, RendezvousStore


class _Player:
    """One end of a ring of two, each the other's neighbour on both sides."""

    def __init__(self, meeting: Rendezvous, rank: int) -> None:
        self._link = GlooChannel(meeting, rank, node_address())
        self._rank = rank

    def play(self, nbytes: int, rounds: int) -> list[float]:
        """Seconds of each trip: hidden states there, a small message back."""
        tensor, seconds = torch.zeros(nbytes, dtype=torch.uint8), []
        for _ in range(rounds):
            started = time.perf_counter()
            if self._rank == 0:
                self._link.send(tensor)
                self._link.next_message()
            else:
                self._link.recv(tensor)
                self._link.post_message(b"taken")
            seconds.append(time.perf_counter() - started)
        return seconds


def measure_hops(trips: dict[int, int]) -> dict[str, float]:
    """{bytes: milliseconds a hop}, for {bytes: trips}, on a cluster there is or one of its own."""
    own_cluster = connect(None)
    try:
        return {str(nbytes): _hop(nbytes, count) for nbytes, count in trips.items()}
    finally:
        if own_cluster is not None:
            own_cluster.close()


def _hop(nbytes: int, rounds: int) -> float:
    """Milliseconds from one stage to the next, the message that tells of it included."""
    place = RendezvousStore(node_address())
    meeting = Rendezvous(place.host, place.port, 1, 2, secret=place.secret)
    actor: Any = ray.remote(_Player)
    players = [actor.options(num_cpus=0.5).remote(meeting, rank) for rank in (0, 1)]
    seconds, _ = ray.get([player.play.remote(nbytes, rounds) for player in players])
    for player in players:
        ray.kill(player)
    return round(1e3 * median(seconds), 3)
