"""Arithmetic on a cluster's free cores and GPUs: which share of them each stage reserves.

Knows numbers that were read from Ray; doesn't call Ray itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

_SMALL = 1e-6  # Ray counts resources in ten thousandths
OWN_SHARE = 0.01  # cores that a stage reserves where nothing but LLMs of this process can run


class InsufficientResources(RuntimeError):
    """Too little is free now; more may become free, or the cluster may grow."""


@dataclass(frozen=True)
class ClusterNode:
    """Cores and GPUs of one node: how many there are, and how many of them are free."""

    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class NodeType:
    """Kind of node that an autoscaler may start, at most `count` of it."""

    cpus: float
    gpus: float
    count: float


@dataclass(frozen=True)
class FreeResources:
    """Snapshot of a cluster.

    nodes: nodes that are up. node_types: kinds of nodes that an autoscaler may start; empty for a
    cluster of fixed size. holders: a phrase for each owner of reserved resources, for errors.
    """

    nodes: tuple[ClusterNode, ...]
    node_types: tuple[NodeType, ...] = ()
    holders: tuple[str, ...] = ()

    @property
    def max_gpus(self) -> float:
        """GPUs once the cluster has grown as far as its autoscaler may go."""
        grown = sum(it.gpus * it.count for it in self.node_types if it.gpus)
        return max(sum(int(node.gpus) for node in self.nodes), grown)

    def with_idle_cores(self) -> FreeResources:
        """Copy of this snapshot in which every core of its nodes is free."""
        return replace(self, nodes=tuple(replace(it, free_cpus=it.cpus) for it in self.nodes))

    def describe(self) -> str:
        """Phrase for an error: how many cores and GPUs are free, and who holds the others."""
        free = ", ".join(
            f"{sum(getattr(node, f'free_{kind}') for node in self.nodes):g} of "
            f"{sum(getattr(node, kind) for node in self.nodes):g} {name}"
            for kind, name in (("cpus", "cores"), ("gpus", "GPUs"))
            if any(getattr(node, kind) for node in self.nodes)
        )
        return f"{free or 'nothing'} free; held by {'; '.join(self.holders) or 'others'}"


@dataclass(frozen=True)
class Bundle:
    """Resources that Ray reserves for one stage.

    num_cpus: cores, or a fraction of one. threads: host threads of the stage, which may be more
    than its reserved cores.
    """

    num_cpus: float
    num_gpus: int
    threads: int

    @property
    def resources(self) -> dict[str, float]:
        """The bundle as Ray's placement groups take it."""
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})


@dataclass(frozen=True)
class BundlePlacement:
    """One bundle a stage. note: a sentence that the user should read about them, or ""."""

    bundles: list[Bundle]
    note: str = ""

    def with_cores(self, num_cpus: float) -> BundlePlacement:
        """Copy that reserves `num_cpus` cores for each stage and leaves its threads unchanged."""
        return replace(self, bundles=[replace(it, num_cpus=num_cpus) for it in self.bundles])


def place_stages(
    cluster: FreeResources,
    device: str,
    num_stages: int | None,
    threads: int | None,
    may_shrink: bool = True,
) -> BundlePlacement:
    """Give each stage its share of a node's free cores, and a GPU if the cluster has any.

    num_stages: number of stages; None means one for every free GPU, or one without GPUs.
    threads: host threads of each stage; None means its number of cores.
    may_shrink: accept fewer cores than the whole share if other programs hold cores.
    Raises ValueError for a placement that this cluster can never have, InsufficientResources for
    one that it can't have now.
    """
    if device.startswith("cuda") and not cluster.max_gpus:
        raise ValueError("--device cuda, but no node of the Ray cluster has a GPU; use cpu")
    if not cluster.max_gpus or device == "cpu":
        return BundlePlacement(_bundles_on_cpus(cluster, num_stages or 1, threads, may_shrink))
    up = sum(int(node.gpus) for node in cluster.nodes)
    free = sum(int(node.free_gpus + _SMALL) for node in cluster.nodes)
    count, note = num_stages or free or 1, ""
    if count > cluster.max_gpus:
        raise ValueError(
            f"{count} stages need a GPU each, but the cluster has {cluster.max_gpus:g}; use "
            f"--pipeline-parallel-size {cluster.max_gpus:g} or --device cpu"
        )
    if num_stages is None and free < cluster.max_gpus:
        reason = f"{up - free} of {up} GPUs are taken" if free < up else f"only {up} GPUs are up"
        note = (
            f"{reason}, and the cluster may have {cluster.max_gpus:g}; using {count} stages "
            "(--pipeline-parallel-size N waits for N GPUs)"
        )
    if num_stages is None and free < up and not may_shrink:
        raise InsufficientResources(f"not every GPU is free: {cluster.describe()}")
    if count > free and not cluster.node_types:
        raise InsufficientResources(f"{count} stages need a GPU each: {cluster.describe()}")
    if count > up:
        note = note or f"{up} GPUs are up, and {count} are asked for; the cluster may start more"
    return BundlePlacement(_bundles_with_gpus(cluster, count, threads, may_shrink), note)


def _bundles_on_cpus(
    cluster: FreeResources, count: int, threads: int | None, may_shrink: bool
) -> list[Bundle]:
    """Bundles of stages without GPUs: spread over the nodes, stages of a node share its cores.

    A head node may offer no cores, so only nodes with cores count.
    """
    offered = [node.cpus for node in cluster.nodes if node.cpus]
    offered = offered or [it.cpus for it in cluster.node_types if it.cpus and it.count]
    if not offered:
        raise ValueError("no node of the Ray cluster offers CPUs; start one with --num-cpus")
    share = min(offered) / -(-count // len(offered))

    def fits(cores: float) -> bool:
        return sum(int(it.free_cpus / cores + _SMALL) for it in cluster.nodes) >= count

    return [_largest_bundle(cluster, share, fits, 0, threads, may_shrink)] * count


def _bundles_with_gpus(
    cluster: FreeResources, count: int, threads: int | None, may_shrink: bool
) -> list[Bundle]:
    """Bundles of one GPU each, with that GPU's share of its node's cores."""
    sizes = [(it.cpus, it.gpus) for it in cluster.nodes]
    sizes += [(it.cpus, it.gpus) for it in cluster.node_types]
    share = max(1.0, min((cpus or 1) / gpus for cpus, gpus in sizes if gpus >= 1))

    def fits(cores: float) -> bool:
        stages_by_node = (
            min(int(node.free_gpus + _SMALL), int(node.free_cpus / cores + _SMALL))
            for node in cluster.nodes
        )
        return sum(stages_by_node) >= count

    return [_largest_bundle(cluster, share, fits, 1, threads, may_shrink)] * count


def _largest_bundle(
    cluster: FreeResources,
    share: float,
    fits: Callable[[float], bool],
    num_gpus: int,
    threads: int | None,
    may_shrink: bool,
) -> Bundle:
    """Bundle with the largest share of cores that fits; the whole share if the cluster may grow.

    share: cores of a stage on an idle cluster. fits: True if every stage finds that many cores.
    """
    share = math.floor(share + _SMALL) if share >= 1 else share
    most = min(share, threads or share)
    smaller = range(int(most) - 1, 0, -1) if may_shrink and threads is None else range(0)
    cores = next((it for it in (most, *smaller) if fits(it)), None)
    if cores is None:
        if not cluster.node_types:
            raise InsufficientResources(f"a stage needs {most:g} cores: {cluster.describe()}")
        cores = most
    return Bundle(cores, num_gpus, threads or max(1, math.floor(cores)))
