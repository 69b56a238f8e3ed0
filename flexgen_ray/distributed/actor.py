"""A stage as a Ray actor: a worker that joins the ring of stages and reports to the driver.

Knows Ray and the ring; the worker that it extends knows neither.
"""

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

REPORT_SECONDS = 0.05  # events within this time go to the driver in one report


class StageWorker(Worker):
    """A worker with the calls that only the driver of a Ray cluster makes."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._channel: GlooChannel | None = None
        self._rank = 0

    def probe(self, device: str, offload_dir: str, with_rates: bool = True) -> Machine:
        """Describe this stage's machine, as Worker.probe does.

        Raises ValueError if Ray gave this stage a GPU that torch can't use.
        """
        if device != "cpu" and ray.get_gpu_ids() and not torch.cuda.is_available():
            where = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
            raise ValueError(
                f"Ray gave a stage on node {where} a GPU, but torch {torch.__version__} finds none "
                "there; install a CUDA build of torch and NVIDIA's driver on that node, or use "
                "--device cpu"
            )
        return super().probe(device, offload_dir, with_rates)

    def join(self, rendezvous: Rendezvous, rank: int) -> None:
        """Join the ring of this rendezvous's epoch, after leaving the ring of an earlier one.

        Raises ChannelClosed if a neighbouring stage doesn't come.
        """
        self.leave()
        self._rank = rank
        try:
            self._channel = GlooChannel(rendezvous, rank, ray.util.get_node_ip_address())
        except RuntimeError as error:
            raise ChannelClosed(f"a neighbouring stage did not come ({error})") from error
        self.connect(self._channel)

    def leave(self) -> None:
        """Leave the ring, which also frees neighbours that wait for this stage."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def run_first(self) -> Iterator[list[Finished | Progress]]:
        """Run the first stage; yields reports, each a list of the events since the last one."""
        report: list[Finished | Progress] = []
        reported = time.monotonic()
        for event in self._run_with_metrics():
            report.append(event)
            if time.monotonic() - reported > REPORT_SECONDS:
                yield report
                report, reported = [], time.monotonic()
        yield report

    def run_later(self) -> None:
        """Run a stage other than the first, without reports: the first stage has every event."""
        for _ in self._run_with_metrics():
            pass

    def host(self) -> str:
        """Name of the node that the actor is on."""
        return socket.gethostname()

    def pid(self) -> int:
        """Number of the actor's process on its node."""
        return os.getpid()

    def _run_with_metrics(self) -> Iterator[Finished | Progress]:
        with StageMetrics(self._rank, self.busy) as metrics:
            for event in self.run():
                if isinstance(event, Progress):
                    metrics.count_tokens(event.new_tokens)
                yield event


StageActor = ray.remote(StageWorker)
