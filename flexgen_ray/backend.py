"""What runs an LLM's requests: a worker in this process, or one in a Ray actor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from flexgen_ray.config import HardwareSpec
from flexgen_ray.request import Finished, Progress, Request
from flexgen_ray.runtime.meter import Measured, Span
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.runtime.worker import Machine, Worker


class Backend(Protocol):
    """What a Worker in this process and a Driver of a Ray actor have in common."""

    def probe(self, device: str, offload_dir: str) -> Machine: ...
    def rates(self, spec: StageSpec) -> HardwareSpec: ...
    def load(self, spec: StageSpec) -> None: ...
    def add(self, requests: list[Request]) -> None: ...
    def run(self) -> Iterator[Finished | Progress]: ...
    def used(self) -> dict[str, dict[str, int]]: ...
    def measured(self) -> Measured: ...
    def spans(self, first: int, count: int) -> list[Span]: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


def start_backend(use_ray: bool, address: str | None, device: str) -> tuple[Backend, int]:
    """The worker, and the host memory that Ray takes beside it."""
    if not use_ray:
        return Worker(), 0
    from flexgen_ray.distributed.driver import Driver

    driver = Driver(address, device)
    return driver, driver.reserved_cpu_bytes
