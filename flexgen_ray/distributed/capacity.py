"""How stages fit into what a cluster's nodes offer: arithmetic on cores and GPUs, without Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_SMALL = 1e-6  # Ray counts in ten thousandths
OWN_SHARE = 0.01  # cores that a stage reserves where nothing but LLMs of this process can run


class InsufficientResources(RuntimeError):
    """Too little is free now; it may become free, or the cluster may grow."""


@dataclass(frozen=True)
class ClusterNode:
    """Cores and GPUs of a machine, all of them and those that are free."""

    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class NodeType:
    """Machines that an autoscaler may start, `count` at most."""

    cpus: float
    gpus: float
    count: float


@dataclass(frozen=True)
class FreeResources:
    """A cluster: its nodes, the types it may grow by, and sentences on who holds what."""

    nodes: tuple[ClusterNode, ...]
    node_types: tuple[NodeType, ...] = ()
    holders: tuple[str, ...] = ()

    @property
    def max_gpus(self) -> float:
        """GPUs once the cluster has grown as far as it may."""
        grown = sum(it.gpus * it.count for it in self.node_types if it.gpus)
        return max(sum(int(node.gpus) for node in self.nodes), grown)

    def with_idle_cores(self) -> FreeResources:
        """A copy of this room, as if all cores of its nodes were free."""
        return replace(self, nodes=tuple(replace(it, free_cpus=it.cpus) for it in self.nodes))

    def describe(self) -> str:
        """Who holds what, for an error's text."""
        free = ", ".join(
            f"{sum(getattr(node, f'free_{kind}') for node in self.nodes):g} of "
            f"{sum(getattr(node, kind) for node in self.nodes):g} {name}"
            for kind, name in (("cpus", "cores"), ("gpus", "GPUs"))
            if any(getattr(node, kind) for node in self.nodes)
        )
        return f"{free or 'nothing'} free; held by {'; '.join(self.holders) or 'others'}"


@dataclass(frozen=True)
class Bundle:
    """Resources that Ray reserves for one stage. threads: its host threads, which may be more."""

    num_cpus: float
    num_gpus: int
    threads: int

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.num_cpus} | ({"GPU": self.num_gpus} if self.num_gpus else {})


@dataclass(frozen=True)
class BundlePlacement:
    """A bundle for every stage. note: what a user should know of them, or nothing."""

    bundles: list[Bundle]
    note: str = ""

    def with_cores(self, num_cpus: float) -> BundlePlacement:
        """A copy with `num_cpus` cores reserved for each stage, whose threads stay as many."""
        return replace(self, bundles=[replace(it, num_cpus=num_cpus) for it in self.bundles])


def place_stages(
    room: FreeResources,
    device: str,
    num_stages: int | None,
    threads: int | None,
    may_shrink: bool = True,
) -> BundlePlacement:
    """Give each stage its share of a node's cores that are free, and a GPU where there are any.

    num_stages: None is a stage for every GPU that is free, or one without GPUs. threads: of each
    stage; None is as many as it has cores. settled: a smaller share will do, where others hold
    cores. Raises ValueError for what can never be, NoRoom for what can't be now.
    """
    if device.startswith("cuda") and not room.max_gpus:
        raise ValueError("--device cuda, but no node of the Ray cluster has a GPU; use cpu")
    if not room.max_gpus or device == "cpu":
        return BundlePlacement(_on_cpus(room, num_stages or 1, threads, may_shrink))
    up = sum(int(node.gpus) for node in room.nodes)
    free = sum(int(node.free_gpus + _SMALL) for node in room.nodes)
    count, note = num_stages or free or 1, ""
    if count > room.max_gpus:
        raise ValueError(
            f"{count} stages need a GPU each, but the cluster has {room.max_gpus:g}; use "
            f"--pipeline-parallel-size {room.max_gpus:g} or --device cpu"
        )
    if num_stages is None and free < room.max_gpus:
        more = f"{up - free} of {up} GPUs are taken" if free < up else f"only {up} GPUs are up"
        note = (
            f"{more}, and the cluster may have {room.max_gpus:g}: {count} stages; "
            "--pipeline-parallel-size N waits for N GPUs"
        )
    if num_stages is None and free < up and not may_shrink:
        raise InsufficientResources(f"not every GPU is free: {room.describe()}")
    if count > free and not room.node_types:
        raise InsufficientResources(f"{count} stages need a GPU each: {room.describe()}")
    if count > up:
        note = note or f"{up} GPUs are up, and {count} are asked for; the cluster may start more"
    return BundlePlacement(_with_gpus(room, count, threads, may_shrink), note)


def _on_cpus(
    room: FreeResources, count: int, threads: int | None, may_shrink: bool
) -> list[Bundle]:
    """Stages spread over the nodes; on a node they share its cores. A head may offer none."""
    offered = [node.cpus for node in room.nodes if node.cpus]
    offered = offered or [it.cpus for it in room.node_types if it.cpus and it.count]
    if not offered:
        raise ValueError("no node of the Ray cluster offers CPUs; start one with --num-cpus")
    share = min(offered) / -(-count // len(offered))

    def fits(cores: float) -> bool:
        return sum(int(it.free_cpus / cores + _SMALL) for it in room.nodes) >= count

    return [_bundle(room, share, fits, 0, threads, may_shrink)] * count


def _with_gpus(
    room: FreeResources, count: int, threads: int | None, may_shrink: bool
) -> list[Bundle]:
    """A GPU each, with its share of its node's cores."""
    sizes = [(it.cpus, it.gpus) for it in room.nodes] + [
        (it.cpus, it.gpus) for it in room.node_types
    ]
    share = max(1.0, min((cpus or 1) / gpus for cpus, gpus in sizes if gpus >= 1))

    def fits(cores: float) -> bool:
        stages = (
            min(int(it.free_gpus + _SMALL), int(it.free_cpus / cores + _SMALL)) for it in room.nodes
        )
        return sum(stages) >= count

    return [_bundle(room, share, fits, 1, threads, may_shrink)] * count


def _bundle(room, share, fits, num_gpus: int, threads: int | None, may_shrink: bool) -> Bundle:
    """The largest share of cores that fits; the whole one where the cluster may grow."""
    share = math.floor(share + _SMALL) if share >= 1 else share
    most = min(share, threads or share)
    smaller = range(int(most) - 1, 0, -1) if may_shrink and threads is None else range(0)
    for cores in (most, *smaller):
        if fits(cores):
            break
    else:
        if not room.node_types:
            raise InsufficientResources(f"a stage needs {most:g} cores: {room.describe()}")
        cores = most
    return Bundle(cores, num_gpus, threads or max(1, math.floor(cores)))
