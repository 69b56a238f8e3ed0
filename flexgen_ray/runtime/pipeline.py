"""Pipeline in this process: each stage in a thread, connected by local channels.

The first stage runs in the caller's thread, and one stage alone is the simplest pipeline. For runs
without Ray; distributed/ has stages in processes. Knows workers; nothing of layers.
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
    """Pipeline with one worker a stage, all in this process."""

    def __init__(self, num_stages: int = 1, threads: int | None = None) -> None:
        self.recoveries: list[Recovery] = []
        self.workers = [Worker(threads) for _ in range(num_stages)]

    @property
    def num_stages(self) -> int:
        return len(self.workers)

    @property
    def resumes(self) -> bool:
        """True if a run goes on after a stage is lost; never, since a process is lost whole."""
        return False

    @property
    def uses_nccl(self) -> bool:
        """True if hidden states go from GPU to GPU; never within a process."""
        return False

    def probe(self, device: str, offload_dir: str) -> list[Machine]:
        """Find out what each stage's machine has free; it is this one for all."""
        return [worker.probe(device, offload_dir) for worker in self.workers]

    def rates(self, spec: StageSpec) -> HardwareSpec:
        return self.workers[0].rates(spec)

    def load(self, specs: list[StageSpec], on_progress: OnProgress = ignore_progress) -> None:
        """Load the stages, one after the other."""
        for worker, spec in zip(self.workers, specs, strict=True):
            worker.load(spec, on_progress)

    def add(self, requests: list[Request]) -> None:
        self.workers[0].add(requests)

    def run(self) -> Generator[Finished | Progress]:
        """Run what was added, and yield the first stage's events; any stage's error ends all."""
        first, *others = self.workers
        if not others:
            yield from first.run()
            return
        channels = LocalChannel.ring(self.num_stages)
        for worker, channel in zip(self.workers, channels, strict=True):
            worker.connect(channel)
        errors: list[BaseException] = []
        threads = [
            Thread(target=_follow, args=(worker, channel, errors), name="stage")
            for worker, channel in zip(others, channels[1:], strict=True)
        ]
        try:
            for thread in threads:
                thread.start()
            # If the caller leaves early, the first stage must end before the others are joined.
            with closing(first.run()) as events:
                yield from events
        except BaseException as error:
            channels[0].close()  # otherwise the other stages would wait for it forever
            if not isinstance(error, ChannelClosed):
                raise
            errors.append(error)
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        # A closed channel is the consequence of another stage's error, so others go first.
        if errors:
            raise min(errors, key=lambda error: isinstance(error, ChannelClosed))

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


def _follow(worker: Worker, channel: LocalChannel, errors: list[BaseException]) -> None:
    """Run a later stage; its error is appended to errors, and ends the neighbours' waiting."""
    try:
        for _ in worker.run():
            pass
    except BaseException as error:
        errors.append(error)
        channel.close()
