"""A stage as a Ray actor: a worker that joins a ring, and says how it is while it runs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import ray
import torch

from flexgen_ray.distributed.metrics import StageMetrics
from flexgen_ray.distributed.transport import GlooChannel, Rendezvous
from flexgen_ray.request import Finished
from flexgen_ray.runtime.events import Progress
from flexgen_ray.runtime.ring import ChannelClosed
from flexgen_ray.runtime.worker import Machine, Worker

TELL_SECONDS = 0.05  # events within this time are told together


class StageWorker(Worker):
    """What the driver asks of a stage beyond a Worker's own calls."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._link: GlooChannel | None = None
        self._rank = 0

    def probe(self, device: str, offload_dir: str, is_calibrated: bool = True) -> Machine:
        """As Worker.probe; a GPU that Ray gave this stage and torch can't use is a ValueError."""
        if device != "cpu" and ray.get_gpu_ids() and not torch.cuda.is_available():
            where = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
            raise ValueError(
                f"Ray gave a stage on node {where} a GPU, but torch {torch.__version__} finds none "
                "there; install a CUDA build of torch and NVIDIA's driver on that node, or use "
                "--device cpu"
            )
        return super().probe(device, offload_dir, is_calibrated)

    def join(self, meeting: Rendezvous, rank: int) -> None:
        """Joins the ring of this meeting's epoch; leaves that of an earlier one.

        LinkClosed if a neighbour doesn't come.
        """
        self.leave()
        self._rank = rank
        try:
            self._link = GlooChannel(meeting, rank, ray.util.get_node_ip_address())
        except RuntimeError as error:
            raise ChannelClosed(f"a neighbouring stage did not come ({error})") from error
        self.connect(self._link)

    def leave(self) -> None:
        """Frees the neighbours too."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def lead(self) -> Iterator[list[Finished | Progress]]:
        """The first stage's run: its events, a few at a time."""
        batch: list[Finished | Progress] = []
        told = time.monotonic()
        for event in self._measured_run():
            batch.append(event)
            if time.monotonic() - told > TELL_SECONDS:
                yield batch
                batch, told = [], time.monotonic()
        yield batch

    def host(self) -> str:
        """The name of its node."""
        return socket.gethostname()

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def follow(self) -> None:
        """A later stage's run."""
        for _ in self._measured_run():
            pass

    def _measured_run(self) -> Iterator[Finished | Progress]:
        with StageMetrics(self._rank, self.busy) as metrics:
            for event in self.run():
                if isinstance(event, Progress):
                    metrics.note_tokens(event.new_tokens)
                yield event


StageActor = ray.remote(StageWorker)
