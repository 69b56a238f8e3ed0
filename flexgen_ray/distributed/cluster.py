"""Connects to a Ray cluster or starts one, and has the options of a stage's actor there."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table

from flexgen_ray.distributed.capacity import Bundle
from flexgen_ray.distributed.own_cluster import OwnCluster, initialize

CONNECT_SECONDS = 5
_NO_CLIENT = (
    "{} is Ray Client, through which stages can't be reached; submit the run instead: `ray job "
    "submit --address http://HEAD:8265 --working-dir . -- python -m flexgen_ray generate ...`, or "
    "run it on a machine of the cluster with --address HEAD:6379"
)


def connect(address: str | None) -> OwnCluster | None:
    """Connect this process to Ray: to the cluster at `address` or RAY_ADDRESS, else to its own.

    A process that is connected already stays connected. Returns the process's own cluster, which
    each caller has to close, or None if the cluster is not its own. Raises ValueError for an
    address of Ray Client, ConnectionError if nothing answers at the address.
    """
    if ray.is_initialized():
        if ray.util.client.ray.is_connected():
            raise ValueError(_NO_CLIENT.format("ray.init(address='ray://...')"))
        return OwnCluster.running()
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        return OwnCluster()
    if address.startswith("ray://"):
        raise ValueError(_NO_CLIENT.format(f"--address {address}"))
    _connect_to(address)
    return None


def is_placed(group: PlacementGroup) -> bool:
    """True if every bundle has a node; Ray moves bundles to another node when theirs is lost."""
    return placement_group_table(group)["state"] == "CREATED"


def actor_options(bundle: Bundle, index: int, group: PlacementGroup) -> dict[str, Any]:
    """Ray's options for the actor of a stage in bundle number `index`.

    Several calls run at a time, so that an actor answers with its heartbeat during a run.
    """
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {
        "num_cpus": bundle.num_cpus,
        "num_gpus": bundle.num_gpus,
        "max_concurrency": 4,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(bundle.threads)}},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, index),
    }


def _connect_to(address: str) -> None:
    """Connect to the cluster at an address.

    Raises ConnectionError, within CONNECT_SECONDS if nothing answers there, or if the cluster
    refuses the token.
    """
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
