"""Measures this machine and saves the result for the planner: `flexgen-ray calibrate`.

The module knows the file and the summary for people; rates.py knows what to measure.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_ray import package_versions
from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.files.output_files import write_text
from flexgen_ray.hardware.rates import CACHE_DTYPES, DeviceRates, MemorySizes, NetworkRates
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.units import format_bytes

if TYPE_CHECKING:
    from flexgen_ray.calibration.rates import Scope
    from flexgen_ray.runtime.worker import Machine

_MIB = 2**20
_SMALL_HOP, _LARGE_HOP = 64 * 2**10, 32 * 2**20
_TRIPS = {_SMALL_HOP: 50, _LARGE_HOP: 5}
MOST_REPEATS = 5  # of one measurement
_NO_HOPS = "Hops between actors were not measured (--no-use-ray)."
_HEADER = "# Measured by `flexgen-ray calibrate`; you may correct the figures by hand.\n"


def calibrate(
    device: str,
    offload_dir: Path,
    gpu_memory: int | None = None,
    is_quick: bool = False,
    uses_ray: bool = True,
    scope: Scope | None = None,
) -> Hardware:
    """Measure this machine in some minutes, or in seconds if is_quick, with a progress bar.

    Each figure is measured until two in a row differ by a tenth at most; if is_quick, once.

    device: auto, cuda or cpu. gpu_memory: bytes that plans may use, None for all that is free.
    scope: the dtypes and heads to measure, and the time for it, None for all of them and no limit.
    Raises ValueError for a device or memory that the machine lacks, OSError if the offload folder's
    disk fails, and RuntimeError, with the figures, if other processes disturb the measurements.
    """
    import torch

    from flexgen_ray.calibration.rates import (
        QUICK,
        THOROUGH,
        Scope,
        count_measurements,
        measure_machine,
    )
    from flexgen_ray.calibration.steady import Measurer
    from flexgen_ray.reporting.progress import show_steps
    from flexgen_ray.runtime.lanes import divide_cores
    from flexgen_ray.runtime.worker import Worker

    machine = Worker().probe(device, str(offload_dir), with_rates=False)
    memory = memory_sizes(machine, gpu_memory)
    on = torch.device(machine.device)
    cores = divide_cores(machine.num_threads, on.type == "cuda", attends_on_host=True)
    scope, effort = scope or Scope(), QUICK if is_quick else THOROUGH
    count = count_measurements(on, scope)
    with show_steps("calibrating", count + uses_ray) as announce:
        take = Measurer(announce, 1 if is_quick else MOST_REPEATS)
        if scope.max_seconds is not None:
            effort = effort.within(scope.max_seconds, count)
            take.deadline = time.perf_counter() + scope.max_seconds
        measured = measure_machine(on, cores, offload_dir, effort, take, scope)
        network = _network(announce) if uses_ray else None
    return Hardware(
        name=machine.host,
        date=time.strftime("%Y-%m-%d"),
        source=f"flexgen-ray calibrate{' --quick' if is_quick else ''} on {_describe(machine)}",
        notes=" ".join(([] if uses_ray else [_NO_HOPS]) + take.notes),
        versions=_versions(),
        memory=memory,
        link=measured.link,
        disk=measured.disk,
        host=measured.host,
        device=measured.device,
        network=network,
    )


def parse_dtypes(text: str) -> tuple[str, ...]:
    """Dtypes of weights and caches from text such as "float16,int4".

    Raises ValueError for names that aren't one of CACHE_DTYPES, and for caches alone.
    """
    dtypes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [dtype for dtype in dtypes if dtype not in CACHE_DTYPES]:
        known = ", ".join(CACHE_DTYPES)
        raise ValueError(f"--dtypes has {unknown[0]!r}; each must be one of {known}")
    if not set(dtypes) & set(DTYPE_BYTES):
        raise ValueError(
            f"--dtypes {text} has only formats of quantized caches; add the dtype that models "
            "compute in, such as float16"
        )
    return dtypes


def save(hardware: Hardware, path: Path) -> None:
    """Write a file that Hardware.load reads, and its folder if it doesn't exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _HEADER + hardware.to_yaml())


def memory_sizes(machine: Machine, gpu_memory: int | None) -> MemorySizes:
    """Free bytes of each tier, in whole MiB.

    Without a GPU, its tier is gpu_memory or half of the host's memory.
    Raises ValueError if gpu_memory is more than what is free.
    """
    on_cuda = machine.on_cuda
    free = machine.gpu_bytes if on_cuda else machine.cpu_bytes // 2
    gpu = free if gpu_memory is None else gpu_memory
    if gpu > machine.gpu_bytes:
        raise ValueError(
            f"--gpu-memory {format_bytes(gpu)} is more than the {format_bytes(machine.gpu_bytes)} "
            f"free on {machine.host}; lower it"
        )
    cpu = machine.cpu_bytes - (0 if on_cuda else gpu)
    return MemorySizes(*(max(size // _MIB, 1) * _MIB for size in (gpu, cpu, machine.disk_bytes)))


def summary(hardware: Hardware) -> Iterator[tuple[str, str]]:
    """Lines of a table for people: a name and its figures; a GB is 1e9 bytes."""
    sizes, link, disk, host = hardware.memory, hardware.link, hardware.disk, hardware.host
    gpu, cpu, space = map(format_bytes, (sizes.gpu, sizes.cpu, sizes.disk))
    yield "memory", f"gpu {gpu}, cpu {cpu}, disk {space}"
    both = _gb(link.h2d_busy_bytes_per_s, link.d2h_busy_bytes_per_s)
    alone = _gb(link.h2d_bytes_per_s, link.d2h_bytes_per_s)
    yield "link", f"{alone} GB/s to the device, from it; both at once {both}"
    yield "disk", f"{_gb(disk.read_bytes_per_s, disk.write_bytes_per_s)} GB/s read, written"
    joint = f"{_gb(host.joint_bytes_per_s)} by link and attention together"
    yield "host memory", f"{_gb(host.read_bytes_per_s)} GB/s read, {joint}"
    yield "host attention", "GB/s alone / with the link busy, by query heads for each KV head"
    for dtype in dict.fromkeys(it.dtype for it in host.attention):
        yield f"  {dtype}", ", ".join(_best_kernels(hardware, dtype))
    yield from _device_summary(hardware.device)
    if hardware.network:
        rate, hop = hardware.network.bytes_per_s, hardware.network.hop_seconds
        yield "hop", f"{hop * 1e3:.2g} ms, {_gb(rate)} GB/s, between two actors on this node"
    if hardware.notes:
        yield "note", hardware.notes


def _best_kernels(hardware: Hardware, dtype: str) -> Iterator[str]:
    groups = {it.queries_per_kv_head for it in hardware.host.attention if it.dtype == dtype}
    for group in sorted(groups):
        best = hardware.attention(dtype, group)
        yield f"{group}: {_gb(best.bytes_per_s, best.busy_bytes_per_s)} ({best.kernel})"


def _device_summary(device: DeviceRates) -> Iterator[tuple[str, str]]:
    rates = f"{_gb(device.memory_bytes_per_s)} GB/s read, {_gb(device.attention_bytes_per_s)}"
    yield "device", f"{rates} attended; {device.launch_seconds * 1e6:.2g} µs for a small op"
    if shares := device.core_shares:
        parts = (
            f"copies {shares.copies:.2g}, disk {shares.disk:.2g}, attention {shares.attention:.2g}"
        )
        yield "cores", f"fraction that other work takes from matrix products: {parts}"
    if device.dequantize_bytes_per_s is not None:
        yield (
            "dequantizing",
            f"{_gb(device.dequantize_bytes_per_s)} GB/s of 16-bit values, from 4 bits",
        )
    yield "matrix products", "TFLOP/s by rows"
    for gemm in device.gemm:
        by_rows = (f"{rows}: {rate / 1e12:.3g}" for rows, rate in gemm.flops_per_s)
        yield f"  {gemm.dtype}", ", ".join(by_rows)


def _gb(*rates: float) -> str:
    return " / ".join(f"{rate / 1e9:.3g}" for rate in rates)


def _network(announce: Callable[[str], None]) -> NetworkRates:
    """Rates between two actors on this node; between two nodes, hops take longer."""
    from flexgen_ray.distributed.hop_benchmark import measure_hops

    announce("hops between two actors")
    seconds = {int(size): taken / 1e3 for size, taken in measure_hops(_TRIPS).items()}
    moving = max(seconds[_LARGE_HOP] - seconds[_SMALL_HOP], 1e-6)
    rate = (_LARGE_HOP - _SMALL_HOP) / moving
    return NetworkRates(float(f"{seconds[_SMALL_HOP]:.4g}"), float(f"{rate:.4g}"))


def _describe(machine: Machine) -> str:
    from flexgen_ray.kernels.host_kernel import cpu_name

    device = "" if machine.device == "cpu" else f"{machine.device_name}, "
    return f"{device}{cpu_name()}, {machine.num_threads} threads"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | package_versions(
        "flexgen-ray", "torch", "numba", "ray"
    )
