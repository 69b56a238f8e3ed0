"""Plans a job for machines of hardware files, and compares the plan with alternatives.

Turns hardware files and tables of lengths into devices and jobs. Compares the plan with other ways
to run the same job, and with better machines. The module knows no tensors; it runs nothing.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from flexgen_ray.config import Budget, HardwareSpec, Policy
from flexgen_ray.cost.roofline import Roof, Roofline
from flexgen_ray.files.text_files import read_lines, read_yaml
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.corners import ON_DEVICE
from flexgen_ray.planner.grid import SearchSpace
from flexgen_ray.planner.pipeline_plan import (
    ModelRates,
    PipelinePlan,
    PlannedJob,
    Rates,
    StageDevice,
)
from flexgen_ray.planner.search import Infeasible, Planner, find_best_plan
from flexgen_ray.units import parse_bytes

MAX_MACHINES = 1024
_MANY_ROWS = 4096  # of products at their full rate
_MAX_DIGITS = 12  # of a length in tokens
RESIDENT = "everything on the GPUs"
WHOLE = "every prompt computed whole"
NODE_KEYS = ("hardware", "count", "gpus")


@dataclass(frozen=True)
class Alternative:
    """Another way to run the job, or the same way on better machines.

    tokens_per_s: throughput, None if it is impossible; why_not then gives the reason.
    """

    name: str
    tokens_per_s: float | None
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    """A plan, alternatives on the same machines, and upgrades of the machines.

    best, flexgen: the rooflines of any schedule and of FlexGen's (`rooflines`).
    """

    plan: PipelinePlan
    alternatives: list[Alternative]
    upgrades: list[Alternative]
    best: Roof | None = None
    flexgen: Roof | None = None


def compare(
    config: ModelConfig,
    nodes: Sequence[HardwareNode],
    job: PlannedJob,
    dtype: str,
    search: SearchSpace,
    on_plan: Callable[[PipelinePlan], None] = lambda plan: None,
    on_estimate: Callable[[float], None] = lambda tokens_per_s: None,
) -> Comparison:
    """Plan the job, and compare the plan.

    on_estimate: called early with about the plan's tokens/s. on_plan: called with the plan before
    the comparison, which takes longer.
    Raises Infeasible if no plan fits these machines.
    """
    devices = devices_of(nodes, config, dtype, search.base.cache_bits)
    planner = Planner(config, devices, job, dtype, search)
    plan = find_best_plan(
        planner, lambda candidate: on_estimate(job.mean_tokens / candidate.seconds_per_sequence)
    )
    on_plan(plan)
    on_device = replace(search, shares=ON_DEVICE)
    alternatives = [_plan_alternative(RESIDENT, planner, search=on_device)]
    if all(node.hardware.host.flops_per_s for node in nodes):
        cpus = tuple(_cpu_device(node.hardware, number) for number, node in enumerate(nodes))
        name = "the CPU alone" if len(nodes) == 1 else "the CPUs alone"
        alternatives.append(_plan_alternative(name, planner, devices=cpus, search=on_device))
    if len(devices) > 1:
        alternatives.append(_plan_replicas(planner))
    if job.sharing is not None:
        alternatives.append(_plan_alternative(WHOLE, planner, job=job.without_sharing))
    # Every upgrade is planned anew, so search only around the plan.
    near = replace(search, layers=None).near(plan.stages[0].policy)
    upgrades = [
        _plan_alternative(name, planner, devices=upgraded, search=near)
        for name, upgraded in _upgrades(devices).items()
    ]
    if search.base == Policy() and not config.expert_format:
        in_four_bits = replace(near, base=Policy(weight_bits=4, cache_bits=4))
        packed = devices_of(nodes, config, dtype, cache_bits=4)
        name = "weights and cache in 4 bits"
        upgrades.append(_plan_alternative(name, planner, devices=packed, search=in_four_bits))
    return Comparison(plan, alternatives, upgrades, *rooflines(devices, plan))


@dataclass(frozen=True)
class HardwareNode:
    """A machine of a cluster, and how many GPUs of its hardware it has."""

    hardware: Hardware
    gpus: int = 1

    def with_memory(self, gpu: str | None, cpu: str | None, disk: str | None) -> HardwareNode:
        """The machine with these sizes, such as `16GiB`, to use of its tiers.

        None keeps the hardware's own size. Raises ValueError for text that is no size.
        """
        sizes = self.hardware.memory
        own = {
            tier: ceil(_parse_size(tier, text) / sizes.share)
            for tier, text in {"gpu": gpu, "cpu": cpu, "disk": disk}.items()
            if text is not None
        }
        return replace(self, hardware=replace(self.hardware, memory=replace(sizes, **own)))


def _parse_size(tier: str, text: str) -> int:
    try:
        nbytes = parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--{tier}-memory: {error}") from error
    if nbytes < 1:
        raise ValueError(f"--{tier}-memory is {text}; it must be above 0")
    return nbytes


def read_nodes(path: str | Path) -> list[HardwareNode]:
    """Read a YAML list of {hardware: preset or file, count: equal machines, gpus: of each}.

    ValueError (bad content) and OSError name the path.
    """
    entries = read_yaml(path)
    try:
        if not isinstance(entries, list) or not all(isinstance(it, dict) for it in entries):
            raise ValueError("must hold a list, such as `- {hardware: t4, count: 2, gpus: 1}`")
        return [node for entry in entries for node in _parse_nodes(entry)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse_nodes(entry: dict) -> list[HardwareNode]:
    unknown = [key for key in entry if key not in NODE_KEYS]
    if unknown or "hardware" not in entry:
        raise ValueError(f"{entry} needs hardware, and takes {', '.join(NODE_KEYS)}")
    for key in ("count", "gpus"):
        if not isinstance(entry.get(key, 1), int) or not 1 <= entry.get(key, 1) <= MAX_MACHINES:
            raise ValueError(f"{key} is {entry[key]!r}; it must be an integer, 1 to {MAX_MACHINES}")
    node = HardwareNode(Hardware.load(entry["hardware"]), entry.get("gpus", 1))
    return [node] * entry.get("count", 1)


def read_job(path: str | Path, num_requests: int | None = None) -> PlannedJob:
    """Read a CSV whose last two columns are prompt and output tokens, one request a line.

    num_requests: size of the job, with lengths as in the file; None takes one request a line.
    Raises ValueError, which names the line.
    """
    lengths = []
    for number, row in enumerate(csv.reader(read_lines(path)), 1):
        cells = [cell.strip() for cell in row[-2:]]
        if len(cells) == 2 and all(_is_length(cell) for cell in cells):
            lengths.append((int(cells[0]), int(cells[1])))
        elif number > 1 and row:
            raise ValueError(
                f"{path}, line {number}: {row[-2:]} are no two lengths, 1 or more "
                f"and of {_MAX_DIGITS} digits at most"
            )
    if not lengths:
        raise ValueError(f"{path} has no line with two lengths, of a prompt and its output")
    return PlannedJob.of(lengths, num_requests)


def _is_length(cell: str) -> bool:
    return cell.isdecimal() and len(cell) <= _MAX_DIGITS and int(cell) > 0


def devices_of(
    nodes: Sequence[HardwareNode], config: ModelConfig, dtype: str, cache_bits: int | None = None
) -> tuple[StageDevice, ...]:
    """A device for each GPU of each machine."""
    rates = [ModelRates(node.hardware, config, dtype, cache_bits) for node in nodes]
    return tuple(
        StageDevice(
            rates[number], node.hardware.budget, f"node {number}", node.hardware.core_shares
        )
        for number, node in enumerate(nodes)
        for _ in range(node.gpus)
    )


def rooflines(
    devices: Sequence[StageDevice], plan: PipelinePlan
) -> tuple[Roof | None, Roof | None]:
    """The rooflines of the best schedule and of FlexGen's for the plan's job and layers.

    None where prompts share, or attention reads few tokens: rooflines don't count what that saves.
    """
    job, stages = plan.job, plan.stages
    if job.sharing is not None or stages[0].is_sparse:
        return None, None
    lines = [
        Roofline(
            stage,
            device.rates(_MANY_ROWS, _MANY_ROWS),
            device.budget,
            job.mean_prompt_len,
            job.mean_tokens,
            -(-job.num_requests // len(stages)),
        )
        for stage, device in zip(stages, devices, strict=True)
    ]
    bests, flexgens = zip(*((line.best, line.flexgen) for line in lines), strict=True)
    return min(bests, key=_speed), min(flexgens, key=_speed)


def _speed(roof: Roof) -> float:
    return roof.tokens_per_s


def _cpu_device(hardware: Hardware, number: int) -> StageDevice:
    """A machine's cores as the device, whose memory is the host's."""
    host = hardware.host
    assert host.flops_per_s is not None
    link = disk = host.read_bytes_per_s  # All data stay in host memory, so neither is slower.
    rates = HardwareSpec(
        h2d_bytes_per_s=link,
        d2h_bytes_per_s=link,
        disk_read_bytes_per_s=disk,
        disk_write_bytes_per_s=disk,
        host_bytes_per_s=host.read_bytes_per_s,
        host_attention_bytes_per_s=host.read_bytes_per_s,
        device_flops_per_s=host.flops_per_s,
        device_bytes_per_s=host.read_bytes_per_s,
    )
    # The host tier holds little here, such as messages between stages.
    memory = hardware.budget.cpu
    budget = Budget(gpu=memory * 15 // 16, cpu=memory // 16, disk=0)
    return StageDevice(lambda *rows: rates, budget, f"node {number}")


def _plan_alternative(name: str, planner: Planner, **changes: Any) -> Alternative:
    """The best plan of a planner with these fields changed."""
    try:
        plan = find_best_plan(replace(planner, **changes))
    except Infeasible as error:
        return Alternative(name, None, str(error))
    return Alternative(name, plan.tokens_per_s)


def _plan_replicas(planner: Planner) -> Alternative:
    """A copy of the model on each GPU, each with its share of the requests and of its node."""
    devices, job = planner.devices, planner.job
    name, rates = f"{len(devices)} independent replicas", []
    share = job.part(len(devices))
    search = replace(planner.search, layers=None)
    for device, count in Counter(_alone(device, devices) for device in devices).items():
        replica = _plan_alternative(name, planner, devices=(device,), job=share, search=search)
        if replica.tokens_per_s is None:
            return replica
        rates.append(count * replica.tokens_per_s)
    return Alternative(name, sum(rates))


def _alone(device: StageDevice, devices: tuple[StageDevice, ...]) -> StageDevice:
    """The device with an equal share of its node's memory and disk, as a node of its own."""
    on_node, budget = sum(other.node == device.node for other in devices), device.budget
    share = Budget(budget.gpu, budget.cpu // on_node, budget.disk // on_node)
    return replace(device, budget=share, node="")


def _upgrades(devices: tuple[StageDevice, ...]) -> dict[str, tuple[StageDevice, ...]]:
    """{upgrade: devices} with twice one resource in every machine, or one more machine."""

    def with_twice_the(tier: str) -> tuple[StageDevice, ...]:
        return tuple(_with_twice_the(tier, device) for device in devices)

    def with_faster(*rates: str) -> tuple[StageDevice, ...]:
        return tuple(replace(it, rates=_FasterRates(it.rates, rates)) for it in devices)

    return {
        "twice the host memory": with_twice_the("cpu"),
        "twice the GPU memory": with_twice_the("gpu"),
        "a link twice as fast": with_faster("h2d_bytes_per_s", "d2h_bytes_per_s"),
        "a disk twice as fast": with_faster("disk_read_bytes_per_s", "disk_write_bytes_per_s"),
        "one more such machine": (*devices, replace(devices[-1], node="one more")),
    }


def _with_twice_the(tier: str, device: StageDevice) -> StageDevice:
    nbytes = getattr(device.budget, tier)
    return replace(device, budget=replace(device.budget, **{tier: 2 * nbytes}))


@dataclass(frozen=True)
class _FasterRates:
    """Rates, some of them doubled."""

    rates: Rates
    doubled: tuple[str, ...]

    def __call__(self, *rows: int) -> HardwareSpec:
        spec = self.rates(*rows)
        return replace(spec, **{name: 2 * getattr(spec, name) for name in self.doubled})
