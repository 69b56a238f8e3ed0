"""All stages in this process, each in a thread, joined by local links; the first runs in the
caller's. One stage is the simplest pipeline. For debugging and tests; Ray has processes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from threading import Thread

from flexgen_ray.config import HardwareSpec
from flexgen_ray.request import Finished, Request
from flexgen_ray.runtime.events import OnProgress, Progress, Recovery, ignore_progress
from flexgen_ray.runtime.meter import StageMeasurements
from flexgen_ray.runtime.ring import ChannelClosed, LocalChannel
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.runtime.worker import Machine, Worker
from flexgen_ray.schedule.ops import Span


class LocalPipeline:
    """A worker a stage."""

    def __init__(self, num_stages: int = 1, threads: int | None = None) -> None:
        self.recoveries: list[Recovery] = []
        self.workers = [Worker(threads) for _ in range(num_stages)]

    @property
    def num_stages(self) -> int:
        return len(self.workers)

    @property
    def resumes(self) -> bool:
        """Whether it goes on after a stage is lost; a process is lost whole."""
        return False

    @property
    def uses_nccl(self) -> bool:
        """Whether hidden states go from GPU to GPU."""
        return False

    def probe(self, device: str, offload_dir: str) -> list[Machine]:
        """The same machine for every stage."""
        return [worker.probe(device, offload_dir) for worker in self.workers]

    def rates(self, spec: StageSpec) -> HardwareSpec:
        return self.workers[0].rates(spec)

    def load(self, specs: list[StageSpec], on_progress: OnProgress = ignore_progress) -> None:
        """One stage after the other."""
        for worker, spec in zip(self.workers, specs, strict=True):
            worker.load(spec, on_progress)

    def add(self, requests: list[Request]) -> None:
        self.workers[0].add(requests)

    def run(self) -> Generator[Finished | Progress]:
        """What the first stage yields; the first error of any stage ends all."""
        first, *others = self.workers
        if not others:
            yield from first.run()
            return
        links = LocalChannel.ring(self.num_stages)
        for worker, link in zip(self.workers, links, strict=True):
            worker.connect(link)
        errors: list[BaseException] = []
        threads = [
            Thread(target=_follow, args=(worker, link, errors), name="stage")
            for worker, link in zip(others, links[1:], strict=True)
        ]
        try:
            for thread in threads:
                thread.start()
            # A generator that is left early must end its run before the others are waited for.
            with closing(first.run()) as events:
                yield from events
        except BaseException as error:
            links[0].close()  # or the others would wait for it without end
            if not isinstance(error, ChannelClosed):
                raise
            errors.append(error)
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        # Whose link was closed suffers from another's fault.
        if errors:
            raise min(errors, key=lambda it: isinstance(it, ChannelClosed))

    def used(self) -> list[dict[str, dict[str, int]]]:
        return [worker.used() for worker in self.workers]

    def measured(self) -> list[StageMeasurements]:
        return [worker.measured() for worker in self.workers]

    def spans(self, stage: int, first: int, count: int) -> list[Span]:
        return self.workers[stage].spans(first, count)

    def abort(self) -> None:
        self.close()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def _follow(worker: Worker, link: LocalChannel, errors: list[BaseException]) -> None:
    """A later stage's run; its error is kept, and ends the neighbours' waiting."""
    try:
        for _ in worker.run():
            pass
    except BaseException as error:
        errors.append(error)
        link.close()
