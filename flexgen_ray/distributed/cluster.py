"""Connects to a Ray cluster or starts one, and says how a stage's actor is made there."""

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
    """Connects this process to Ray, on the cluster there is or on one that is started for it.

    Returns a cluster of this process's own, to be closed once for each time it is returned. Raises
    ValueError for an address of Ray Client, ConnectionError if nothing answers.
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
    """Whether every bundle is somewhere; Ray looks for another place when a node has gone."""
    return placement_group_table(group)["state"] == "CREATED"


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
