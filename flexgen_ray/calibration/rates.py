"""Measures all rates of this machine's device, link, disk and host that the planner needs.

Each rate is the median of several runs, since a prediction is of typical times; shapes are those of
common models. The module decides what to measure; hardware/measure.py measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch

from flexgen_ray.calibration.issuing import issue_seconds
from flexgen_ray.calibration.steady import TENTH, Measurer
from flexgen_ray.hardware.measure import Action, Bench, CacheShape
from flexgen_ray.hardware.rates import (
    CACHE_DTYPES,
    AttentionRates,
    CoreShares,
    DeviceRates,
    DiskRates,
    GemmRates,
    HostRates,
    LinkRates,
)
from flexgen_ray.kernels.host_kernel import KERNELS, load_kernel
from flexgen_ray.runtime.lanes import Cores
from flexgen_ray.store.tiers import TORCH_DTYPE

GEMM_ROWS = (1, 4, 16, 64, 256, 1024)
_HOST_WIDTH = 1024
_SLOW_GEMM_SECONDS = 0.25  # matrix products that take longer need no more rows
_DECODING_ROWS, _PREFILL_ROWS = 8, 512
_LEAST_SHARE = 0.01
_RUNS = 5  # of a measurement: two that agree, of often two things, and what prepares them
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """Time, memory and shapes of the measurements.

    seconds: for each measurement. nbytes: of each of two buffers. width: a model's hidden size on a
    CPU, and half of that on a GPU.
    """

    seconds: float
    nbytes: int
    width: int
    cache: CacheShape

    def within(self, seconds: float, count: int) -> Effort:
        """The effort that leaves room for this number of measurements, repeated, in so long."""
        return replace(self, seconds=min(self.seconds, seconds / (count * _RUNS)))


THOROUGH = Effort(0.25, 256 * 2**20, 2048, CacheShape(16, 8, 8, 544, 128))
QUICK = Effort(0.005, 8 * 2**20, 256, CacheShape(4, 8, 8, 64, 128))


@dataclass(frozen=True)
class MeasuredRates:
    """The rates of a machine, without those of the network."""

    link: LinkRates
    disk: DiskRates
    host: HostRates
    device: DeviceRates


@dataclass(frozen=True)
class Scope:
    """The dtypes and the numbers of query heads for each KV head to measure.

    max_seconds: of time for all of it; from then on each thing is measured once. None for no limit.
    """

    dtypes: tuple[str, ...] = CACHE_DTYPES
    queries_per_kv_head: tuple[int, ...] = (1, 4, 8)
    max_seconds: float | None = None

    def gemm_dtypes(self, device: torch.device) -> list[str]:
        """Dtypes of matrix products; GPUs older than Ampere have none in bfloat16."""
        has_all = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
        supported = [dtype for dtype in TORCH_DTYPE if has_all or dtype != "bfloat16"]
        return [dtype for dtype in supported if dtype in self.dtypes]


EVERYTHING = Scope()


def count_measurements(device: torch.device, scope: Scope = EVERYTHING) -> int:
    """Number of measurements that `measure_machine` announces."""
    gemms = len(scope.gemm_dtypes(device)) * len(GEMM_ROWS)
    shares = 3 if device.type == "cpu" else 0
    return 11 + shares + len(list(_attention_cases(scope))) + gemms


def _attention_cases(scope: Scope) -> Iterator[tuple[str, str, int]]:
    """Cases of host attention: kernel, dtype, query heads for each KV head."""
    return product(KERNELS, scope.dtypes, scope.queries_per_kv_head)


def measure_machine(
    device: torch.device,
    cores: Cores,
    folder: Path,
    effort: Effort,
    take: Measurer,
    scope: Scope = EVERYTHING,
) -> MeasuredRates:
    """Measure this machine.

    Uses twice effort.nbytes of memory and effort.nbytes of the folder's disk, and frees all.
    Raises OSError, which names the folder, if its disk fails, and Unsteady, with the figures, if
    other processes use the machine.
    """
    num_threads = torch.get_num_threads()
    try:
        with torch.inference_mode(), Bench(device, effort.nbytes, effort.seconds, median) as bench:
            disk = DiskRates(*map(_rounded, take("disk", lambda: bench.disk_rates(folder))))
            torch.set_num_threads(1)  # As in a run, each direction of copies has one core.
            link = _link(bench, take)
            host = _host(bench, effort.cache, cores, take, scope)
            torch.set_num_threads(cores.device)
            rates = _device(bench, effort, take, scope)
            if rates.is_cpu:
                shares = _core_shares(bench, effort, cores, folder, take)
                rates = replace(rates, core_shares=shares)
            return MeasuredRates(link, disk, host, rates)
    finally:
        torch.set_num_threads(num_threads)


def _link(bench: Bench, take: Measurer) -> LinkRates:
    to_device, to_host = bench.copier(to_device=True), bench.copier(to_device=False)
    (h2d,) = take("link, host to device", lambda: [bench.rate(*to_device)])
    (d2h,) = take("link, device to host", lambda: [bench.rate(*to_host)])
    both = take("link, both directions", lambda: bench.measure_together(to_device, to_host))
    message = "one direction of the link reached {} GB/s while both were busy, and {} alone"
    busy = (take.check_part(*pair, message) for pair in zip(both, (h2d, d2h), strict=True))
    return LinkRates(*map(_rounded, (h2d, d2h, *busy)))


def _host(bench: Bench, cache: CacheShape, cores: Cores, take: Measurer, scope: Scope) -> HostRates:
    """Rates of host memory and of host attention by kernel, dtype and shape.

    The joint rate is that of the attention case that moves most together with the link.
    """
    torch.set_num_threads(cores.total)
    (read,) = take("host memory", lambda: [bench.read_rate(_HOST)])
    torch.set_num_threads(cores.host)
    kernels = {name: load_kernel(name, cores.host) for name in KERNELS}
    copying = bench.copier(to_device=True)
    entries, joint = [], 0.0
    for name, dtype, group in _attention_cases(scope):
        bits = None if dtype in TORCH_DTYPE else int(dtype.removeprefix("int"))
        shape = replace(cache, num_heads=group * cache.num_kv_heads, bits=bits)
        # Quantized values become float32, so the dtype of the queries doesn't matter.
        of_queries = TORCH_DTYPE.get(dtype, torch.float16)
        attending = bench.attender(kernels[name], of_queries, shape)
        case = f"host attention, {name}, {dtype}, {group} query heads for each KV head"
        alone, busy, link = take(case, partial(_alone_and_beside, bench, attending, copying))
        message = f"{case}: {{}} GB/s while the link was busy, and {{}} alone"
        busy = take.check_part(busy, alone, message)
        entries.append(AttentionRates(name, dtype, group, _rounded(alone), _rounded(busy)))
        joint = max(joint, busy + link)
    if take.is_rough:
        read = max(read, joint)
    message = "host memory gave {} GB/s to link and attention together, and {} to a plain read"
    joint = take.check_part(joint, read, message)
    torch.set_num_threads(cores.total)
    product = partial(bench.gemm_rate, torch.float32, GEMM_ROWS[-1], (_HOST_WIDTH,) * 2, True)
    (flops,) = take("matrix products of the host", lambda: [product()])
    return HostRates(_rounded(read), _rounded(joint), tuple(entries), _rounded(flops))


def _alone_and_beside(
    bench: Bench, work: tuple[float, Action], other: tuple[float, Action]
) -> list[float]:
    """Rates of the first work alone, of the first beside the other, and of the other."""
    return [bench.rate(*work), *bench.measure_together(work, other)]


def _device(bench: Bench, effort: Effort, take: Measurer, scope: Scope) -> DeviceRates:
    """Rates of the device: memory, attention, dequantization, small ops, sampling, products."""
    device, is_cpu = bench.device, bench.device.type == "cpu"
    (memory,) = take("device memory", lambda: [bench.read_rate(device)])
    rows = effort.cache.rows * (1 if is_cpu else 4)
    dtype = torch.float32 if is_cpu else _device_dtype(device, scope)
    shape = replace(effort.cache, rows=rows)
    kernel = load_kernel("numba" if is_cpu else "sdpa", torch.get_num_threads())
    attend = partial(bench.device_attention_rate, kernel, dtype, shape)
    (attention,) = take("device attention", lambda: [attend()])
    matrix = effort.width, 4 * effort.width
    (dequantized,) = take("dequantizing", lambda: [bench.dequantize_rate(dtype, 4, matrix)])
    few_and_many = _DECODING_ROWS, _PREFILL_ROWS
    launch, elementwise = take("small ops", lambda: bench.small_ops(few_and_many, effort.width))
    issue = None
    if not is_cpu:
        launch = bench.launch_seconds()
        issue = _rounded(issue_seconds(device))
    (sampled,) = take("sampling", lambda: [bench.sampling_rate()])
    gemm = tuple(
        GemmRates(name, tuple(_gemm(bench, effort, name, take)))
        for name in scope.gemm_dtypes(device)
    )
    return DeviceRates(
        is_cpu,
        _rounded(memory),
        _rounded(attention),
        _rounded(launch),
        gemm,
        _rounded(dequantized),
        elementwise_bytes_per_s=_rounded(elementwise),
        sampled_values_per_s=_rounded(sampled),
        issue_seconds=issue,
    )


def _device_dtype(device: torch.device, scope: Scope) -> torch.dtype:
    """The dtype in which a GPU attends and dequantizes: float16 if it is to be measured."""
    dtypes = scope.gemm_dtypes(device)
    return TORCH_DTYPE["float16" if "float16" in dtypes else dtypes[0]]


def _core_shares(
    bench: Bench, effort: Effort, cores: Cores, folder: Path, take: Measurer
) -> CoreShares:
    """Fractions of a decoding batch's matrix product that other work costs, on a CPU.

    A fraction above one would mean that taking turns is faster. It occurs with copies that never
    pause, which runs don't have, so it is reduced to one.
    """
    multiply = bench.gemm(torch.float32, _DECODING_ROWS, (4 * effort.width, effort.width))

    def share(name: str, other: tuple[float, Action]) -> float:
        (taken,) = take(name, lambda: [bench.share_taken(multiply, other)], TENTH)
        return _rounded(min(max(taken, _LEAST_SHARE), 1.0))

    copies = share("cores that copies take", bench.copier(to_device=True))
    with bench.disk(folder) as (reading, _):
        disk = share("cores that disk reads take", reading)
    attending = bench.attender(load_kernel("numba", cores.host), torch.float32, effort.cache)
    return CoreShares(copies, disk, share("cores that host attention takes", attending))


def _gemm(bench: Bench, effort: Effort, dtype: str, take: Measurer) -> Iterator[tuple[int, float]]:
    """Pairs of rows and flops per second of an MLP's products, which dominate most models.

    Stops once a product is slow, since its rate grows no more.
    """
    width = effort.width * (1 if bench.device.type == "cpu" else 2)
    up, down = (4 * width, width), (width, 4 * width)
    seconds = 0.0
    for rows in GEMM_ROWS:
        name = f"matrix products, {dtype}, {rows} rows"
        if seconds >= _SLOW_GEMM_SECONDS:
            take.announce(name)  # Progress counts the measurements that are skipped, too.
        else:
            measure = partial(bench.gemm_rate, TORCH_DTYPE[dtype], rows)
            rates = take(name, partial(_each, measure, (up, down)))
            rate = 2 / sum(1 / each for each in rates)
            seconds = 8.0 * rows * width**2 / rate
            yield rows, _rounded(rate)


def _each(measure: Callable[[tuple[int, int]], float], shapes: Iterable) -> list[float]:
    return [measure(shape) for shape in shapes]


def _rounded(rate: float) -> float:
    """The rate in four digits: measurements aren't more accurate, and people read the files."""
    return float(f"{rate:.4g}")
