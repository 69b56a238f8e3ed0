"""Short measurements of a machine, one resource or several at a time.

`Bench` has the buffers that measurements use, and the time that each may take. A rate is that of
the fastest run, or of the median run; of actions at the same time, it is each one's mean.
`measure_rates` gives the rates of a plan: each resource is measured alone, so nothing can beat a
bound made of them. The module knows kernels, copies and disks; calibration/ decides what to measure
for the planner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import cycle
from math import ceil, prod
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen_ray.config import PAGE_TOKENS, Budget, HardwareSpec
from flexgen_ray.kernels import attention
from flexgen_ray.kernels.host_kernel import HostKernel
from flexgen_ray.kernels.pack import unpack
from flexgen_ray.kernels.sampling import SamplingRow, sample
from flexgen_ray.layout.placement import PAGE, aligned
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.layers import product
from flexgen_ray.quant.packing import packed_bytes
from flexgen_ray.store.disk import DiskTier
from flexgen_ray.store.memory import MemoryTier
from flexgen_ray.store.tiers import TORCH_DTYPE

FREE = 1e18  # rate of a resource that the run doesn't use
SECONDS = 0.3  # time for each measurement
BUFFER = 256 * 2**20  # bytes of each buffer, more than any processor cache has
Action = Callable[[], object]

PIECE = 32 * 2**20  # bytes of one copy, as in a run; larger copies are hardly faster
_HOST = torch.device("cpu")
_LEAST_SECONDS = 2e-3  # least time of a run; shorter actions are repeated
_MOST_REPEATS = 1000
_LEAST_OPS = 3


def measure_rates(
    plan: StagePlan, budget: Budget, device: torch.device, offload_dir: Path, attend: HostKernel
) -> HardwareSpec:
    """Rates of this process's device, link, disk and host, for the plan's shapes and dtype.

    Uses no more memory than the budget, and frees it. attend: the host's attention kernel.
    """
    nbytes = aligned(min(BUFFER, (budget.cpu + budget.gpu) // 6), PAGE)
    config, dtype = plan.config, TORCH_DTYPE[plan.dtype]
    weight = (config.intermediate_size, config.hidden_size)
    cache = CacheShape(
        max(plan.attended_rows, 1),
        config.num_heads,
        config.num_kv_heads,
        plan.max_seq_len,
        config.head_dim,
        plan.policy.cache_bits,
    )
    with Bench(device, nbytes, SECONDS) as bench:
        uses_disk = budget.disk >= nbytes
        read, write = bench.disk_rates(offload_dir) if uses_disk else (FREE, FREE)
        host = bench.read_rate(torch.device("cpu"))
        return HardwareSpec(
            h2d_bytes_per_s=bench.rate(*bench.copier(to_device=True)),
            d2h_bytes_per_s=bench.rate(*bench.copier(to_device=False)),
            disk_read_bytes_per_s=read,
            disk_write_bytes_per_s=write,
            host_bytes_per_s=host,
            host_attention_bytes_per_s=bench.rate(*bench.attender(attend, dtype, cache)),
            device_flops_per_s=bench.gemm_rate(dtype, plan.tile_tokens, weight),
            device_bytes_per_s=host if device.type == "cpu" else bench.read_rate(device),
            device_decode_flops_per_s=bench.gemm_rate(dtype, plan.policy.gpu_batch_size, weight),
        )


@dataclass(frozen=True)
class CacheShape:
    """The cache of one layer for some rows, and the query heads that attend it.

    context: tokens of each row. bits: of a quantized cache, else None.
    """

    rows: int
    num_heads: int
    num_kv_heads: int
    context: int
    head_dim: int
    bits: int | None = None

    @property
    def width(self) -> int:
        """Elements of a token's keys in one KV head, or their bytes in a quantized cache."""
        return packed_bytes(self.head_dim, self.bits) if self.bits else self.head_dim

    @property
    def numel(self) -> int:
        """Elements, or bytes if quantized, of all keys and values."""
        return 2 * self.rows * self.num_kv_heads * self.context * self.width


class Bench(AbstractContextManager):
    """Measurements with two buffers of nbytes, one on the host, one on the device.

    With CUDA the host's buffer is registered.
    seconds: time for each measurement. statistic: of the times of its runs, min for a bound that
    nothing beats, median for a typical time.
    """

    def __init__(
        self,
        device: torch.device,
        nbytes: int,
        seconds: float,
        statistic: Callable[[list[float]], float] = min,
    ) -> None:
        self.device = device
        self.seconds = seconds
        self._statistic = statistic
        self.nbytes = nbytes
        self._tier = MemoryTier("cpu", nbytes, _HOST, pinned=device.type == "cuda")
        self.host = self._tier.allocate("measurements", nbytes).fill_(1)
        self.on_device = torch.ones(nbytes, dtype=torch.uint8, device=device)
        _wait(device)  # Copies run on streams of their own, which don't wait for this one.

    def __exit__(self, *_: object) -> None:
        self._tier.close()
        self.on_device = self.on_device[:0].clone()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rate(self, amount: float, action: Action, device: torch.device = _HOST) -> float:
        """Amount per second of an action; first runs are left out.

        The first may compile and load code, and a GPU's clock rises only under load.
        device: the one that runs the action, perhaps still when the call returns.
        """
        self._warm_up(action, device)
        count, runs = 1, list[float]()
        begin = now = time.perf_counter()
        while now < begin + self.seconds or not runs:
            started = time.perf_counter()
            for _ in range(count):
                action()
            _wait(device)
            now = time.perf_counter()
            taken = max(now - started, 1e-9)
            runs.append(taken / count)
            count = min(max(count, ceil(count * _LEAST_SECONDS / taken)), _MOST_REPEATS)
        return amount / self._statistic(runs)

    def _warm_up(self, action: Action, device: torch.device) -> None:
        """Run an action once, and on a GPU as long again as a quarter of a measurement."""
        action()
        _wait(device)
        end = time.perf_counter() + self.seconds / 4
        while device.type == "cuda" and time.perf_counter() < end:
            action()
            _wait(device)

    def measure_together(self, *works: tuple[float, Action]) -> list[float]:
        """Amounts per second of actions that run at the same time.

        works: pairs of an amount and an action that returns when its work is done. The first runs
        in this thread, each other in a thread with one core.
        """
        for _, action in works:
            action()
        num_threads = torch.get_num_threads()
        deadline = time.perf_counter() + self.seconds
        try:
            with ThreadPoolExecutor(len(works), initializer=_take_one_core) as pool:
                others = [pool.submit(_mean_rate, *work, deadline) for work in works[1:]]
                first = _mean_rate(*works[0], deadline)
                return [first, *(other.result() for other in others)]
        finally:
            torch.set_num_threads(num_threads)

    def copier(self, to_device: bool) -> tuple[int, Action]:
        """Bytes of a piece, and an action that copies the next piece and waits for it."""
        ends = (self.host, self.on_device) if to_device else (self.on_device, self.host)
        size = min(PIECE, self.nbytes)
        sources, targets = (end[: self.nbytes // size * size].split(size) for end in ends)
        pieces = cycle(zip(sources, targets, strict=True))
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def copy() -> None:
            source, target = next(pieces)
            if stream is None:
                target.copy_(source)
                return
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            stream.synchronize()

        return size, copy

    def read_rate(self, device: torch.device) -> float:
        """Bytes per second of a plain read of the host's or the device's memory."""
        memory = self.host if device.type == "cpu" else self.on_device
        return self.rate(memory.nbytes, memory.view(torch.float32).sum, device)

    @contextmanager
    def disk(self, folder: Path) -> Iterator[tuple[tuple[int, Action], tuple[int, Action]]]:
        """Bytes and an action that reads the whole buffer from disk, then the same for a write.

        The file has no name, so the system deletes it however this ends. OSError names the folder.
        """
        tier, size = DiskTier(self.nbytes, folder), self.nbytes
        try:
            region = tier.allocate("measurements", size)
            region.write(self.host)
            reading = size, lambda: region.read_into(self.host)
            yield reading, (size, lambda: region.write(self.host))
        finally:
            tier.close()

    def disk_rates(self, folder: Path) -> tuple[float, float]:
        """Bytes per second of disk reads and writes."""
        with self.disk(folder) as (reading, writing):
            return self.rate(*reading), self.rate(*writing)

    def gemm_rate(
        self, dtype: torch.dtype, rows: int, shape: tuple[int, int], on_host: bool = False
    ) -> float:
        """Flops per second of a `gemm`."""
        flops, device = 2.0 * rows * shape[0] * shape[1], _HOST if on_host else self.device
        return self.rate(flops, self.gemm(dtype, rows, shape, on_host), device)

    def dequantize_rate(self, dtype: torch.dtype, bits: int, shape: tuple[int, int]) -> float:
        """Bytes per second of 16-bit values that the device dequantizes, matrix after matrix."""
        packed_shape = shape[0], packed_bytes(shape[1], bits)
        size = packed_shape[0] * packed_shape[1]
        memory = self.on_device[: len(self.on_device) // size * size]
        matrices = cycle(memory.view(-1, *packed_shape))
        out = torch.empty(shape, dtype=dtype, device=self.device)
        return self.rate(2.0 * out.numel(), lambda: unpack(next(matrices), bits, out), self.device)

    def attender(
        self, kernel: HostKernel, dtype: torch.dtype, shape: CacheShape
    ) -> tuple[int, Action]:
        """Bytes of keys and values, and an action in which the host attends the next ones.

        dtype: of the queries, and of a cache that isn't quantized.
        """
        pages = shape.rows * ceil(shape.context / PAGE_TOKENS)
        pool = 2, pages, shape.num_kv_heads, PAGE_TOKENS, shape.width
        memory = _filled(self.host, torch.uint8 if shape.bits else dtype, prod(pool))
        return _attender(kernel, memory.view(-1, *pool), shape, dtype)

    def device_attention_rate(self, dtype: torch.dtype, shape: CacheShape) -> float:
        """Bytes of keys and values per second that the device attends in decoding.

        As in a run, rows have room for more tokens than they have.
        """
        memory = _filled(self.on_device, dtype, shape.numel)
        seen = shape.context - 1
        coming = cycle(memory.view(*_caches(shape))[..., :seen, :])
        q = torch.full((shape.rows, shape.num_heads, shape.head_dim), 0.5).to(memory)
        lens = [seen] * shape.rows

        def attend() -> None:
            keys, values = next(coming)
            q.copy_(attention.decode(q, keys, values, lens))

        nbytes = shape.numel * memory.itemsize * seen // shape.context
        return self.rate(nbytes, attend, self.device)

    def sampling_rate(self) -> float:
        """Logits per second of which tokens are drawn."""
        logits = torch.randn(12, 2**17, device=self.device)
        draws = [SamplingRow(1.0, 1.0, 0.5)] * len(logits)
        return self.rate(logits.numel(), lambda: sample(logits, draws), self.device)

    def launch_seconds(self) -> float:
        """Seconds to issue an op that does next to nothing."""
        x = torch.zeros(16, device=self.device)
        return 1 / self.rate(1, lambda: x.add_(1), self.device)

    def small_ops(self, rows: tuple[int, int], width: int) -> tuple[float, float]:
        """Seconds of an op between matrix products, and the bytes per second that it moves.

        The time of an op is a constant and a part for each row; times with few rows and with many
        give both. The constant counts however small the op is.
        """
        (few, short), (many, long) = (
            (count, self._seconds_after_gemm(count, width)) for count in rows
        )
        seconds_per_row = max(long - short, 1e-12) / (many - few)
        # Mean of a norm and a copy, which read and write each value, and a sum, which reads two.
        bytes_per_row = width * 4 * (2 + 3 + 2) / 3
        return max(short - few * seconds_per_row, 1e-9), bytes_per_row / seconds_per_row

    def _seconds_after_gemm(self, rows: int, width: int) -> float:
        """Mean seconds of a norm, a sum or a copy, in turn, each after a matrix product.

        As in a model, the product has evicted the op's operands from the processor's caches.
        """
        multiply = self.gemm(torch.float32, rows, (width, width))
        x, y = torch.full((2, rows, width), 0.5, device=self.device)
        kinds = (lambda: F.layer_norm(x, (width,)), lambda: x + y, lambda: x.copy_(y))
        for op in (multiply, *kinds):  # First use loads code.
            self._warm_up(op, self.device)
        ops = cycle(kinds)
        taken: list[float] = []
        deadline = time.perf_counter() + self.seconds
        while len(taken) < _LEAST_OPS or time.perf_counter() < deadline:
            multiply()
            _wait(self.device)
            started = time.perf_counter()
            next(ops)()
            _wait(self.device)
            taken.append(time.perf_counter() - started)
        # The slowest tenth is left out: other processes interrupted these.
        return fmean(sorted(taken)[: ceil(0.9 * len(taken))])

    def gemm(
        self, dtype: torch.dtype, rows: int, shape: tuple[int, int], on_host: bool = False
    ) -> Action:
        """An action that multiplies `rows` rows by a weight.

        shape: of the weight, [out, in]. The buffer holds many weights that take turns, so that each
        is read from memory.
        """
        memory, size = self.host if on_host else self.on_device, shape[0] * shape[1]
        weights = cycle(_filled(memory, dtype, size).view(-1, *shape))
        x = torch.full((rows, shape[1]), 0.5, dtype=dtype, device=memory.device)
        return lambda: product(x, next(weights))

    def share_taken(self, own: Action, other: tuple[float, Action]) -> float:
        """Fraction of `own`'s work that is left undone while `other` runs at its full rate."""
        own_alone, other_alone = self.rate(1, own), self.rate(*other)
        own_beside, other_beside = self.measure_together((1, own), other)
        return (1 - own_beside / own_alone) * other_alone / other_beside


def _caches(shape: CacheShape) -> tuple[int, ...]:
    """Shape of memory that holds the keys and values of as many caches as it has room for."""
    return -1, 2, shape.rows, shape.num_kv_heads, shape.context, shape.width


def _attender(
    kernel: HostKernel, caches: Tensor, shape: CacheShape, dtype: torch.dtype
) -> tuple[int, Action]:
    """Bytes of one cache's tokens, and an action that attends the next cache.

    caches: [caches, 2, pages, kv_heads, PAGE_TOKENS, width]; a row's pages are neighbours.
    """
    size = shape.rows, shape.num_heads, shape.head_dim
    q = torch.full(size, 0.5, dtype=dtype, device=caches.device)
    lens, out = [shape.context] * shape.rows, torch.empty_like(q)
    tables = torch.arange(caches.shape[2], dtype=torch.int32).view(shape.rows, -1)
    coming = cycle(caches)

    def attend() -> None:
        keys, values = next(coming)
        kernel(q, keys, values, tables, lens, out)

    return shape.numel * caches.itemsize, attend


def _filled(memory: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """The memory as whole multiples of `size` elements, filled with numbers from -1 to 1.

    Takes new memory if not even one multiple fits. Bytes of quantized values get a pattern that is
    a small number as a group's minimum and scale, too.
    """
    typed = memory.view(dtype)
    count = len(typed) // size * size
    filled = typed[:count] if count else torch.empty(size, dtype=dtype, device=memory.device)
    if dtype == torch.uint8:
        return filled.fill_(0x38)
    pattern = torch.linspace(-1, 1, PAGE, device=memory.device)
    whole = len(filled) // PAGE * PAGE
    filled[:whole].view(-1, PAGE).copy_(pattern)
    filled[whole:].fill_(0.5)
    return filled


@torch.inference_mode()
def _mean_rate(amount: float, action: Action, deadline: float) -> float:
    """Mean amount per second of an action that is repeated until the deadline."""
    begin, count = time.perf_counter(), 0
    while not count or time.perf_counter() < deadline:
        action()
        count += 1
    return amount * count / (time.perf_counter() - begin)


def _take_one_core() -> None:
    # On first use in a thread, torch sets its number of threads to the process's; set it after.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
