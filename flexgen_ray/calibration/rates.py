"""Everything that a planner needs to know of this machine's device, links, disk and host, measured.

Each rate is the median of what a resource alone gave, for predictions are of what happens; shapes
are those of common models, not of one. Knows what to measure; how is measure.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch

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
_SLOW_PRODUCT_SECONDS = 0.25
_DECODING_ROWS, _PREFILL_ROWS = 8, 512
_LEAST_SHARE = 0.01
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """Seconds for each measurement, bytes of each of two buffers, and the shapes that are used;
    width: a model's hidden size on a CPU, half of that on a GPU."""

    seconds: float
    nbytes: int
    width: int
    cache: CacheShape


THOROUGH = Effort(0.25, 256 * 2**20, 2048, CacheShape(16, 8, 8, 544, 128))
QUICK = Effort(0.005, 8 * 2**20, 256, CacheShape(4, 8, 8, 64, 128))


@dataclass(frozen=True)
class MeasuredRates:
    """Of a machine, without what lies beyond it."""

    link: LinkRates
    disk: DiskRates
    host: HostRates
    device: DeviceRates


@dataclass(frozen=True)
class Scope:
    """Of which dtypes and head groups the rates are measured, if not of all."""

    dtypes: tuple[str, ...] = CACHE_DTYPES
    queries_per_kv_head: tuple[int, ...] = (1, 4, 8)

    def gemm_dtypes(self, device: torch.device) -> list[str]:
        """Before Ampere a GPU has no fast products in bfloat16."""
        has_all = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
        known = [dtype for dtype in TORCH_DTYPE if has_all or dtype != "bfloat16"]
        return [dtype for dtype in known if dtype in self.dtypes]


EVERYTHING = Scope()


def count_measurements(device: torch.device, scope: Scope = EVERYTHING) -> int:
    """How often `measure_machine` announces one."""
    gemms = len(scope.gemm_dtypes(device)) * len(GEMM_ROWS)
    shares = 3 if device.type == "cpu" else 0
    return 11 + shares + len(list(_attended(scope))) + gemms


def _attended(scope: Scope) -> Iterator[tuple[str, str, int]]:
    """(kernel, dtype, queries a KV head) of host attention."""
    return product(KERNELS, scope.dtypes, scope.queries_per_kv_head)


def measure_machine(
    device: torch.device,
    cores: Cores,
    folder: Path,
    effort: Effort,
    take: Measurer,
    scope: Scope = EVERYTHING,
) -> MeasuredRates:
    """Takes twice effort.nbytes of memory, and as much of the folder's disk; gives all back.

    Raises OSError, naming the folder, if its disk doesn't do, and Unsteady, with the figures, if
    others use the machine.
    """
    num_threads = torch.get_num_threads()
    try:
        with torch.inference_mode(), Bench(device, effort.nbytes, effort.seconds, median) as bench:
            disk = DiskRates(*map(_rounded, take("disk", lambda: bench.disk_rates(folder))))
            torch.set_num_threads(1)  # copies have a core each
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
    what = "the link gave {} GB/s to a direction while it was busy, and {} alone"
    busy = (take.check_part(*pair, what) for pair in zip(both, (h2d, d2h), strict=True))
    return LinkRates(*map(_rounded, (h2d, d2h, *busy)))


def _host(bench: Bench, cache: CacheShape, cores: Cores, take: Measurer, scope: Scope) -> HostRates:
    """Attention by kernel, dtype and shape. What the best case moves together with the link is
    what host memory gives to both."""
    torch.set_num_threads(cores.total)
    (read,) = take("host memory", lambda: [bench.read_rate(_HOST)])
    torch.set_num_threads(cores.host)
    kernels = {name: load_kernel(name, cores.host) for name in KERNELS}
    copying = bench.copier(to_device=True)
    entries, joint = [], 0.0
    for name, dtype, group in _attended(scope):
        bits = None if dtype in TORCH_DTYPE else int(dtype.removeprefix("int"))
        shape = replace(cache, num_heads=group * cache.num_kv_heads, bits=bits)
        # Whatever dtype queries have, packed values become float32.
        of_queries = TORCH_DTYPE.get(dtype, torch.float16)
        attending = bench.attender(kernels[name], of_queries, shape)
        what = f"host attention, {name}, {dtype}, {group} queries a KV head"
        alone, busy, link = take(what, partial(_alone_and_beside, bench, attending, copying))
        busy = take.check_part(busy, alone, f"{what}: {{}} GB/s beside the link, and {{}} alone")
        entries.append(AttentionRates(name, dtype, group, _rounded(alone), _rounded(busy)))
        joint = max(joint, busy + link)
    told = "host memory gave {} GB/s to link and attention together, and {} to a plain read"
    if take.most == 1:
        read = max(read, joint)
    joint = take.check_part(joint, read, told)
    torch.set_num_threads(cores.total)
    product = partial(bench.gemm_rate, torch.float32, GEMM_ROWS[-1], (_HOST_WIDTH,) * 2, True)
    (flops,) = take("matrix products of the host", lambda: [product()])
    return HostRates(_rounded(read), _rounded(joint), tuple(entries), _rounded(flops))


def _alone_and_beside(
    bench: Bench, work: tuple[float, Action], other: tuple[float, Action]
) -> list[float]:
    """Rates of the first alone, and of both together."""
    return [bench.rate(*work), *bench.measure_together(work, other)]


def _device(bench: Bench, effort: Effort, take: Measurer, scope: Scope) -> DeviceRates:
    device, is_cpu = bench.device, bench.device.type == "cpu"
    (memory,) = take("device memory", lambda: [bench.read_rate(device)])
    rows = effort.cache.rows * (1 if is_cpu else 4)
    dtype = torch.float32 if is_cpu else torch.float16
    shape = replace(effort.cache, rows=rows)
    (attention,) = take("device attention", lambda: [bench.device_attention_rate(dtype, shape)])
    matrix = effort.width, 4 * effort.width
    (unpacked,) = take("unpacking", lambda: [bench.dequantize_rate(dtype, 4, matrix)])
    few_and_many = _DECODING_ROWS, _PREFILL_ROWS
    launch, elementwise = take("launches", lambda: bench.small_ops(few_and_many, effort.width))
    if not is_cpu:
        launch = bench.launch_seconds()
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
        _rounded(unpacked),
        elementwise_bytes_per_s=_rounded(elementwise),
        sampled_values_per_s=_rounded(sampled),
    )


def _core_shares(
    bench: Bench, effort: Effort, cores: Cores, folder: Path, take: Measurer
) -> CoreShares:
    """Of a product of a decoding batch. More than all would mean that taking turns were faster; it
    is seen where copies never pause, and not in runs."""
    multiply = bench.product(torch.float32, _DECODING_ROWS, (4 * effort.width, effort.width))

    def share(name: str, other: tuple[float, Action]) -> float:
        (taken,) = take(name, lambda: [bench.share_taken(multiply, other)], TENTH)
        return _rounded(min(max(taken, _LEAST_SHARE), 1.0))

    copies = share("cores that copies take", bench.copier(to_device=True))
    with bench.disk(folder) as (reading, _):
        disk = share("cores that disk reads take", reading)
    attending = bench.attender(load_kernel("numba", cores.host), torch.float32, effort.cache)
    return CoreShares(copies, disk, share("cores that host attention takes", attending))


def _gemm(bench: Bench, effort: Effort, dtype: str, take: Measurer) -> Iterator[tuple[int, float]]:
    """(rows, flops a second) of an MLP's products, of which models mostly consist; no more rows
    once one is slow, for its rate has settled."""
    width = effort.width * (1 if bench.device.type == "cpu" else 2)
    up, down = (4 * width, width), (width, 4 * width)
    seconds = 0.0
    for rows in GEMM_ROWS:
        name = f"matrix products, {dtype}, {rows} rows"
        if seconds >= _SLOW_PRODUCT_SECONDS:
            take.announce(name)
        else:
            measure = partial(bench.gemm_rate, TORCH_DTYPE[dtype], rows)
            rates = take(name, partial(_each, measure, (up, down)))
            rate = 2 / sum(1 / each for each in rates)
            seconds = 8.0 * rows * width**2 / rate
            yield rows, _rounded(rate)


def _each(measure: Callable[[tuple[int, int]], float], shapes: Iterable) -> list[float]:
    return [measure(shape) for shape in shapes]


def _rounded(rate: float) -> float:
    """To four digits: measurements aren't better, and files are read by people."""
    return float(f"{rate:.4g}")
