"""Brings a stage up on a Ray cluster, feeds it, and takes it down.

Looks like a Worker to whoever uses it. Knows Ray; not what a stage computes.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from flexgen_ray.config import HardwareSpec
from flexgen_ray.distributed.actor import StageActor
from flexgen_ray.request import Finished, Progress, Request
from flexgen_ray.runtime.meter import Measured, Span
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.runtime.worker import Machine

OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB; prompts and tokens need little
REQUESTS_PER_CALL = 256
START_SECONDS = 120
CONNECT_SECONDS = 5


class Driver:
    """One StageActor on a cluster that is there already, or on one started for this run."""

    def __init__(self, address: str | None = None, device: str = "auto") -> None:
        self._actor: Any = None
        self._owns_cluster = _connect(address)
        try:
            self._options = _actor_options(device)
            self._start_actor()
        except BaseException:
            self.close()
            raise

    @property
    def reserved_cpu_bytes(self) -> int:
        """Host memory that Ray's object store may take, if this run brought it along."""
        return OBJECT_STORE_BYTES if self._owns_cluster else 0

    def probe(self, device: str, offload_dir: str) -> Machine:
        return self._call("probe", device, offload_dir)

    def rates(self, spec: StageSpec) -> HardwareSpec:
        return self._call("rates", spec)

    def load(self, spec: StageSpec) -> None:
        self._call("load", spec)

    def add(self, requests: list[Request]) -> None:
        """In calls that a small object store can hold."""
        for start in range(0, len(requests), REQUESTS_PER_CALL):
            self._call("add", requests[start : start + REQUESTS_PER_CALL])

    def run(self) -> Iterator[Finished | Progress]:
        """What the stage yields. A run can't be called back: close it early, then `abort`."""
        events = self._actor.run.options(num_returns="streaming").remote()
        for event in events:
            yield _get(event)

    def used(self) -> dict[str, dict[str, int]]:
        return self._call("used")

    def measured(self) -> Measured:
        return self._call("measured")

    def spans(self, first: int, count: int) -> list[Span]:
        return self._call("spans", first, count)

    def abort(self) -> None:
        """Ends a run by ending its process; a fresh one takes its place when it is needed."""
        self._stop_actor()

    def close(self) -> None:
        """Stops the actor, and Ray if this run started it."""
        self._stop_actor()
        if self._owns_cluster and ray.is_initialized():
            ray.shutdown()

    def _start_actor(self) -> None:
        if not ray.is_initialized():
            raise RuntimeError("this LLM is closed; make another one")
        actor_class: Any = StageActor
        options = self._options
        self._actor = actor_class.options(**options).remote()
        try:
            ray.get(self._actor.__ray_ready__.remote(), timeout=START_SECONDS)
        except GetTimeoutError as error:
            raise RuntimeError(
                f"Ray found no node with {options['num_cpus']} free CPUs and "
                f"{options['num_gpus']} free GPUs within {START_SECONDS} s; "
                "stop other jobs or choose another --address"
            ) from error

    def _stop_actor(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized():
            ray.kill(actor)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            self._start_actor()
        return _get(getattr(self._actor, method).remote(*arguments))


def _get(reference: ray.ObjectRef) -> Any:
    """The value, or the error that the stage itself raised."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause or error) from None
    except RayActorError as error:
        raise RuntimeError(
            f"the stage's process died ({error}); if the node ran out of memory, lower --cpu-memory"
        ) from error


def _connect(address: str | None) -> bool:
    """True if a cluster was started because there was none to connect to."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _connect_to(address)
        return False
    # A policy may fill the host's memory on purpose; Ray's own killer would end the run.
    os.environ.setdefault("RAY_memory_usage_threshold", "0.99")
    _init(
        address="local",
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
    )
    return True


def _init(**options: Any) -> None:
    """ray.init, quietly, and with the caller's answer to SIGTERM left in place."""
    answer = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, answer)


def _connect_to(address: str) -> None:
    """ConnectionError, within seconds, if nobody answers there or the token is refused."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(
                f"no Ray cluster answers at {address} ({error}); check --address and RAY_ADDRESS"
            ) from error
    try:
        _init(address=address)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}; if the cluster asks for a token, as Ray does by default, set "
            "RAY_AUTH_MODE=token here and copy its token to ~/.ray/auth_token"
        ) from error


def _actor_options(device: str) -> dict[str, Any]:
    """A GPU if wanted and there, and that GPU's share of its node's cores."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda, but no node of the Ray cluster has a GPU; use cpu")
    uses_gpu = bool(gpus) and device != "cpu"
    node = max(gpus if uses_gpu else nodes, key=lambda node: node.get("CPU", 0))
    num_cpus = max(1, math.floor(node.get("CPU", 1) / (node["GPU"] if uses_gpu else 1)))
    # Ray would set it to num_cpus; whoever has set it for this run knows better.
    threads = os.environ.get("OMP_NUM_THREADS") or str(num_cpus)
    return {
        "num_cpus": num_cpus,
        "num_gpus": int(uses_gpu),
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}},
    }
