"""What a planner is asked: machines, a job's lengths, and what else one might do instead.

Turns hardware files and length tables into devices and jobs, plans, and compares the plan with
other ways to run the same job, and with better machines. Knows no tensors; runs nothing.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from statistics import fmean

from flexgen_ray.config import Budget, HardwareSpec, Policy
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
_MAX_DIGITS = 12  # of a length in tokens
RESIDENT = "everything on the GPUs"
NODE_KEYS = ("hardware", "count", "gpus")


@dataclass(frozen=True)
class HardwareNode:
    """A machine of a cluster, with so many of its hardware's GPUs."""

    hardware: Hardware
    gpus: int = 1

    def with_memory(self, gpu: str | None, cpu: str | None, disk: str | None) -> HardwareNode:
        """With these sizes, such as `16GiB`, to use of each tier; the hardware's own, where None.
        ValueError names one that is no size."""
        sizes = self.hardware.memory
        own = {
            tier: ceil(_size(tier, text) / sizes.share)
            for tier, text in {"gpu": gpu, "cpu": cpu, "disk": disk}.items()
            if text is not None
        }
        return replace(self, hardware=replace(self.hardware, memory=replace(sizes, **own)))


def _size(tier: str, text: str) -> int:
    try:
        nbytes = parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--{tier}-memory: {error}") from error
    if nbytes < 1:
        raise ValueError(f"--{tier}-memory is {text}; it must be above 0")
    return nbytes


def read_nodes(path: str | Path) -> list[HardwareNode]:
    """A YAML list of {hardware: preset or file, count: machines alike, gpus: of each}.

    ValueError (bad content) and OSError name the path.
    """
    entries = read_yaml(path)
    try:
        if not isinstance(entries, list) or not all(isinstance(it, dict) for it in entries):
            raise ValueError("must hold a list, such as `- {hardware: t4, count: 2, gpus: 1}`")
        return [node for entry in entries for node in _nodes(entry)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _nodes(entry: dict) -> list[HardwareNode]:
    unknown = [key for key in entry if key not in NODE_KEYS]
    if unknown or "hardware" not in entry:
        raise ValueError(f"{entry} needs hardware, and takes {', '.join(NODE_KEYS)}")
    for key in ("count", "gpus"):
        if not isinstance(entry.get(key, 1), int) or not 1 <= entry.get(key, 1) <= MAX_MACHINES:
            raise ValueError(f"{key} is {entry[key]!r}; it must be an integer, 1 to {MAX_MACHINES}")
    return [HardwareNode(Hardware.load(entry["hardware"]), entry.get("gpus", 1))] * entry.get(
        "count", 1
    )


def read_job(path: str | Path, num_requests: int | None = None) -> PlannedJob:
    """A CSV whose last two columns are prompt and output tokens, one request a line.

    num_requests: as many of that kind; those of the file, if None. ValueError names the line.
    """
    prompts, outputs = [], []
    for number, row in enumerate(csv.reader(read_lines(path)), 1):
        cells = [cell.strip() for cell in row[-2:]]
        if len(cells) == 2 and all(_is_length(cell) for cell in cells):
            prompts.append(int(cells[0]))
            outputs.append(int(cells[1]))
        elif number > 1 and row:
            raise ValueError(
                f"{path}, line {number}: {row[-2:]} are no two lengths, 1 or more "
                f"and of {_MAX_DIGITS} digits at most"
            )
    if not prompts:
        raise ValueError(f"{path} has no line with two lengths, of a prompt and its output")
    longest = max(map(sum, zip(prompts, outputs, strict=True)))
    return PlannedJob(
        num_requests or len(prompts),
        max(prompts),
        longest - max(prompts) if longest > max(prompts) else 1,
        fmean(prompts),
        fmean(outputs),
    )


def _is_length(cell: str) -> bool:
    return cell.isdecimal() and len(cell) <= _MAX_DIGITS and int(cell) > 0


def devices_of(
    nodes: Sequence[HardwareNode], config: ModelConfig, dtype: str, cache_bits: int | None = None
) -> tuple[StageDevice, ...]:
    """One for each GPU of each machine."""
    rates = [ModelRates.of(node.hardware, config, dtype, cache_bits) for node in nodes]
    return tuple(
        StageDevice(
            rates[number], node.hardware.budget, f"node {number}", node.hardware.core_shares
        )
        for number, node in enumerate(nodes)
        for _ in range(node.gpus)
    )


@dataclass(frozen=True)
class Alternative:
    """Another way to run the job, or the same way with more: its tokens/s, or why it can't be."""

    name: str
    tokens_per_s: float | None
    why_not: str = ""


@dataclass(frozen=True)
class Comparison:
    """A plan, what else could be done with the same machines, and what better ones would bring."""

    plan: PipelinePlan
    alternatives: list[Alternative]
    upgrades: list[Alternative]


def compare(
    config: ModelConfig,
    nodes: Sequence[HardwareNode],
    job: PlannedJob,
    dtype: str,
    search: SearchSpace,
    announce: Callable[[PipelinePlan], None] = lambda plan: None,
    estimate: Callable[[float], None] = lambda tokens_per_s: None,
) -> Comparison:
    """announce: called with the plan before it is compared, which takes longer; estimate: called
    before it is made, with about its tokens/s. Raises Infeasible if the job can't be done on these
    machines at all."""
    devices = devices_of(nodes, config, dtype, search.base.cache_bits)
    plan = find_best_plan(
        Planner(config, devices, job, dtype, search),
        lambda sketch: estimate(job.mean_tokens / sketch.seconds_per_sequence),
    )
    announce(plan)
    on_device = replace(search, shares=ON_DEVICE)
    alternatives = [_try(RESIDENT, config, devices, job, dtype, on_device)]
    if all(node.hardware.host.flops_per_s for node in nodes):
        cores = tuple(_cores_of(node.hardware, number) for number, node in enumerate(nodes))
        name = "the CPU alone" if len(nodes) == 1 else "the CPUs alone"
        alternatives.append(_try(name, config, cores, job, dtype, on_device))
    if len(devices) > 1:
        alternatives.append(_replicas(config, devices, job, dtype, search))
    near = replace(search, layers=None).near(plan.stages[0].policy)
    upgrades = _upgrades(config, devices, job, dtype, near)
    if search.base == Policy():
        in_four = replace(near, base=Policy(weight_bits=4, cache_bits=4))
        packed = devices_of(nodes, config, dtype, cache_bits=4)
        upgrades.append(_try("weights and cache in 4 bits", config, packed, job, dtype, in_four))
    return Comparison(plan, alternatives, upgrades)


def _cores_of(hardware: Hardware, number: int) -> StageDevice:
    """A machine's cores as the device, with the host's memory for all that there is."""
    host = hardware.host
    assert host.flops_per_s is not None
    link = disk = host.read_bytes_per_s  # nothing leaves that memory
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
    # The host tier holds little beside, such as what stages send each other.
    memory = hardware.budget.cpu
    budget = Budget(gpu=memory * 15 // 16, cpu=memory // 16, disk=0)
    return StageDevice(lambda *rows: rates, budget, f"node {number}")


def _try(
    name: str,
    config: ModelConfig,
    devices: tuple[StageDevice, ...],
    job: PlannedJob,
    dtype: str,
    search: SearchSpace,
) -> Alternative:
    try:
        plan = find_best_plan(Planner(config, devices, job, dtype, search))
    except Infeasible as error:
        return Alternative(name, None, str(error))
    return Alternative(name, plan.tokens_per_s)


def _replicas(
    config: ModelConfig,
    devices: tuple[StageDevice, ...],
    job: PlannedJob,
    dtype: str,
    search: SearchSpace,
) -> Alternative:
    """A copy of the model on each GPU, each with its share of the requests and of its node."""
    name, rates = f"{len(devices)} independent replicas", []
    share = replace(job, num_requests=-(-job.num_requests // len(devices)))
    alone = replace(search, layers=None)
    for device, count in Counter(_alone(device, devices) for device in devices).items():
        found = _try(name, config, (device,), share, dtype, alone)
        if found.tokens_per_s is None:
            return found
        rates.append(count * found.tokens_per_s)
    return Alternative(name, sum(rates))


def _alone(device: StageDevice, devices: tuple[StageDevice, ...]) -> StageDevice:
    """With its share of its node's memory and disk."""
    mates, its = sum(other.node == device.node for other in devices), device.budget
    part = Budget(its.gpu, its.cpu // mates, its.disk // mates)
    return replace(device, budget=part, node="")


def _upgrades(
    config: ModelConfig,
    devices: tuple[StageDevice, ...],
    job: PlannedJob,
    dtype: str,
    search: SearchSpace,
) -> list[Alternative]:
    """Every machine with twice as much of one thing, or one more machine like the last.

    search: of blocks like the plan's, for there are several to plan.
    """

    def richer(tier: str) -> tuple[StageDevice, ...]:
        return tuple(
            replace(it, budget=replace(it.budget, **{tier: 2 * getattr(it.budget, tier)}))
            for it in devices
        )

    def faster(*rates: str) -> tuple[StageDevice, ...]:
        return tuple(replace(it, rates=_Faster(it.rates, rates)) for it in devices)

    one_more = (*devices, replace(devices[-1], node="one more"))
    tries = {
        "twice the host memory": richer("cpu"),
        "twice the GPU memory": richer("gpu"),
        "a link twice as fast": faster("h2d_bytes_per_s", "d2h_bytes_per_s"),
        "a disk twice as fast": faster("disk_read_bytes_per_s", "disk_write_bytes_per_s"),
        "one more such machine": one_more,
    }
    return [_try(name, config, it, job, dtype, search) for name, it in tries.items()]


@dataclass(frozen=True)
class _Faster:
    """Rates, some of them doubled."""

    rates: Rates
    doubled: tuple[str, ...]

    def __call__(self, decode_rows: int, prefill_rows: int) -> HardwareSpec:
        spec = self.rates(decode_rows, prefill_rows)
        return replace(spec, **{name: 2 * getattr(spec, name) for name in self.doubled})
