"""Connects to a Ray cluster, or starts one of its own, and reserves a bundle for every stage."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from flexgen_ray.distributed.initialize import initialize
from flexgen_ray.distributed.own_cluster import OwnCluster

CONNECT_SECONDS = 5


def connect(address: str | None) -> OwnCluster | None:
    """Connects this process to Ray; returns the cluster if there was none and it was started."""
    if ray.is_initialized():
        return None
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        return OwnCluster()
    _connect_to(address)
    return None


@dataclass(frozen=True)
class Bundle:
    """What Ray reserves for one stage. threads: its host threads, which may be more."""

    num_cpus: float
    num_gpus: int
    threads: int

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})


def plan_bundles(device: str, num_stages: int | None, threads: int | None) -> list[Bundle]:
    """One bundle a stage, each with its share of a node's cores; None is a stage for every GPU.

    threads: of each stage; None is as many as it has cores. Raises ValueError if there are too few
    GPUs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda, but no node of the Ray cluster has a GPU; use cpu")
    if not gpus or device == "cpu":
        count = num_stages or 1
        # Stages spread over the nodes; on a node they share its cores. A head may offer none.
        offered = [node["CPU"] for node in nodes if node.get("CPU")]
        if not offered:
            raise ValueError("no node of the Ray cluster offers CPUs; start one with --num-cpus")
        on_a_node = -(-count // len(offered))
        cores = min(offered) / on_a_node
        return [_bundle(cores, 0, threads)] * count
    count = num_stages or gpus
    if count > gpus:
        raise ValueError(
            f"{count} stages need a GPU each, but the cluster has {gpus}; use --stages {gpus} or "
            "--device cpu"
        )
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    cores = min(node.get("CPU", 1) / node["GPU"] for node in with_gpus)
    return [_bundle(max(1, cores), 1, threads)] * count


def _bundle(cores: float, num_gpus: int, threads: int | None) -> Bundle:
    """A stage with its share of a node's cores, or with what its threads need of it."""
    share = math.floor(cores) if cores >= 1 else cores
    return Bundle(min(share, threads or share), num_gpus, threads or max(1, math.floor(share)))


def reserve(bundles: list[Bundle], seconds: float) -> PlacementGroup:
    """A placement group, spread over the nodes, whose hosts' memory and links then add up.

    Raises RuntimeError, saying what there is, if it can't be had within so many seconds.
    """
    group = placement_group([bundle.resources for bundle in bundles], strategy="SPREAD")
    if not group.wait(seconds):
        ray.util.remove_placement_group(group)
        raise RuntimeError(
            f"Ray could not reserve {len(bundles)} bundles of {bundles[0].resources} within "
            f"{seconds:g} s; free are {free_resources()}; stop other jobs, use fewer --stages, or "
            "choose another --address"
        )
    return group


def has_room(group: PlacementGroup) -> bool:
    """Whether every bundle is somewhere; Ray looks for another place when a node has gone."""
    return placement_group_table(group)["state"] == "CREATED"


def free_resources() -> dict[str, float]:
    """Cores and GPUs that nobody has reserved, of all nodes."""
    available = ray.available_resources().items()
    return {name: round(count, 2) for name, count in available if name in ("CPU", "GPU")}


def actor_options(bundle: Bundle, index: int, group: PlacementGroup) -> dict[str, Any]:
    """Of the actor in a bundle. Its run must not keep it from answering how it is."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {
        "num_cpus": bundle.num_cpus,
        "num_gpus": bundle.num_gpus,
        "max_concurrency": 4,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(bundle.threads)}},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, index),
    }


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
        initialize(address=address)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}; if the cluster asks for a token, set "
            "RAY_AUTH_MODE=token here and copy its token to ~/.ray/auth_token"
        ) from error
