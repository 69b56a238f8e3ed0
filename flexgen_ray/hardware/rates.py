"""A machine's sizes and rates, as hardware files list them: by kernel, dtype and number of rows.

Rates are per second. The module knows the figures; spec.py decides which rate a model gets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from math import log

from flexgen_ray.config import BITS, DTYPE_BYTES
from flexgen_ray.files.yaml import Table, check_rates, check_table

# Seconds of the issuing thread for each op of the schedule, where a file has none: generating and
# queueing one took 10.9 microseconds (docs/results/issue-cpu.json); 2 are assumed for each of its
# two events.
ISSUE_SECONDS = 15e-6
CACHE_DTYPES = (*DTYPE_BYTES, *(f"int{bits}" for bits in BITS))


@dataclass(frozen=True)
class MemorySizes:
    """Bytes of each tier.

    share: fraction of them that a plan may use; the rest is for other programs. With a CPU as the
    device, `gpu` and `cpu` are parts of the same memory.
    """

    gpu: int
    cpu: int
    disk: int
    share: float = 0.9

    def __post_init__(self) -> None:
        check_rates(self)
        if self.share > 1:
            raise ValueError(f"share is {self.share}; it must be a fraction, at most 1")


@dataclass(frozen=True)
class LinkRates:
    """Rates of copies between registered host memory and the device (h2d: to the device).

    Each direction has a rate alone, and one while the other direction is busy.
    """

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    h2d_busy_bytes_per_s: float
    d2h_busy_bytes_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True)
class DiskRates:
    """Rates of the offload folder's disk, without the page cache if the file system allows."""

    read_bytes_per_s: float
    write_bytes_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True)
class AttentionRates:
    """Bytes of keys and values that a host kernel attends, alone and while the link is busy.

    Bytes are those in which the cache is kept. dtype: int4 and int8 are quantized caches.
    """

    kernel: str
    dtype: str
    queries_per_kv_head: int
    bytes_per_s: float
    busy_bytes_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)
        _check_dtype(self.dtype, CACHE_DTYPES)


@dataclass(frozen=True)
class HostRates:
    """Rates of host memory and the host's cores.

    read_bytes_per_s: read by the cores alone. joint_bytes_per_s: moved by the link and by host
    attention together. flops_per_s: matrix products of many rows in float32 by all cores, None if
    unknown.
    """

    read_bytes_per_s: float
    joint_bytes_per_s: float
    attention: tuple[AttentionRates, ...]
    flops_per_s: float | None = None

    def __post_init__(self) -> None:
        check_rates(self)
        if not self.attention:
            raise ValueError("attention is empty; it needs at least one entry")
        shapes = [(it.kernel, it.dtype, it.queries_per_kv_head) for it in self.attention]
        if twice := [shape for shape in shapes if shapes.count(shape) > 1]:
            raise ValueError(f"attention has {twice[0]} twice; keep one of them")


@dataclass(frozen=True)
class GemmRates:
    """Rates of matrix products whose weights are read from device memory each time.

    flops_per_s: pairs of a number of rows and a rate.
    """

    dtype: str
    flops_per_s: Table

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        check_table("flops_per_s", self.flops_per_s)


@dataclass(frozen=True)
class CoreShares:
    """Fractions of the cores that other work occupies where the device is the host's cores.

    Each is the fraction of the device's own work that is left undone while copies, disk reads or
    host attention run at their full rate, since all share cores and memory.
    """

    copies: float
    disk: float
    attention: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True)
class DeviceRates:
    """Rates of the device.

    attention_bytes_per_s: bytes of keys and values that are attended in decoding.
    launch_seconds: time to launch one torch op; on a CPU, time of a small op between matrix
    products. issue_seconds: time that the schedule's own Python takes of the issuing thread for
    each of its ops, only of a GPU; ISSUE_SECONDS (15 microseconds) if None.
    dequantize_bytes_per_s: bytes of output in 16-bit values; None if it was not measured.
    core_shares: only of a CPU. elementwise_bytes_per_s: bytes that norms, sums and copies between
    matrix products read and write. sampled_values_per_s: logits of which tokens are drawn. The last
    two are None if unknown.
    """

    is_cpu: bool
    memory_bytes_per_s: float
    attention_bytes_per_s: float
    launch_seconds: float
    gemm: tuple[GemmRates, ...]
    dequantize_bytes_per_s: float | None = None
    core_shares: CoreShares | None = None
    elementwise_bytes_per_s: float | None = None
    sampled_values_per_s: float | None = None
    issue_seconds: float | None = None

    def __post_init__(self) -> None:
        check_rates(self)
        if not self.gemm:
            raise ValueError("gemm is empty; it needs at least one entry")


@dataclass(frozen=True)
class NetworkRates:
    """Rates between two stages' actors. hop_seconds: time to send a small tensor and a reply."""

    hop_seconds: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)


def interpolate(table: Iterable[tuple[int, float]], number: float) -> float:
    """Interpolate a rate along a power law, that is, linearly between logarithms.

    Numbers beyond the table's ends get the rate of that end.
    table: pairs of a number and its rate, sorted by number.
    """
    points = list(table)
    above = bisect_left(points, number, key=lambda point: point[0])
    if above == 0 or above == len(points):
        return points[min(above, len(points) - 1)][1]
    (low, first), (high, last) = points[above - 1 : above + 1]
    rate = first * (last / first) ** (log(number / low) / log(high / low))
    return min(max(rate, min(first, last)), max(first, last))


def _check_dtype(dtype: str, known: Iterable[str] = DTYPE_BYTES) -> None:
    if dtype not in known:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(known)}")
