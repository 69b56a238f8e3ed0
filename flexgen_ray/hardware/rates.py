"""A machine's rates, per second, as hardware files have them: by kernel, dtype and rows.

Knows what was measured; which rate a model gets is hardware.py's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from math import log

from flexgen_ray.config import BITS, DTYPE_BYTES
from flexgen_ray.files.yaml import Table, check_rates, check_table

CACHE_DTYPES = (*DTYPE_BYTES, *(f"int{bits}" for bits in BITS))


@dataclass(frozen=True)
class MemorySizes:
    """Bytes of each tier. share: of them that a plan may use, the rest is for all others; with a
    CPU as the device gpu and cpu are parts of the same memory."""

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
    """Of copies between registered host memory and the device: each direction alone, and each
    while the other is busy too."""

    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    h2d_busy_bytes_per_s: float
    d2h_busy_bytes_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True)
class DiskRates:
    """Of the offload folder, past the page cache where that can be had."""

    read_bytes_per_s: float
    write_bytes_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True)
class AttentionRates:
    """Bytes of K and V, as the cache keeps them, that a kernel of the host attends: alone, and
    while the link is busy. dtype: int4 and int8 are packed caches (quant/packing.py)."""

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
    """read: of host memory by the cores alone; joint: that the link and host attention move of it
    together. flops: of the cores' matrix products of many rows in float32, None if unknown."""

    read_bytes_per_s: float
    joint_bytes_per_s: float
    attention: tuple[AttentionRates, ...]
    flops_per_s: float | None = None

    def __post_init__(self) -> None:
        check_rates(self)
        if not self.attention:
            raise ValueError("attention is empty; it needs an entry at least")
        shapes = [(it.kernel, it.dtype, it.queries_per_kv_head) for it in self.attention]
        if twice := [shape for shape in shapes if shapes.count(shape) > 1]:
            raise ValueError(f"attention has {twice[0]} twice; keep one of them")


@dataclass(frozen=True)
class GemmRates:
    """Flops of matrix products by their rows, the weights read from device memory each time."""

    dtype: str
    flops_per_s: Table

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        check_table("flops_per_s", self.flops_per_s)


@dataclass(frozen=True)
class CoreShares:
    """Where the device is the host's cores: of its work, what goes undone while the link copies,
    the disk reads or the host attends, each at its own rate; for they share cores and memory."""

    copies: float
    disk: float
    attention: float

    def __post_init__(self) -> None:
        check_rates(self)


@dataclass(frozen=True)
class DeviceRates:
    """launch_seconds: to issue one op; of a CPU, to do a small one between products. attention:
    bytes of K and V in decoding. dequantize: bytes of 16-bit values that come of packed ones, None
    where nothing dequantizes. elementwise: bytes that norms, sums and copies between products read
    and write; sampled: logits of which tokens are drawn; core_shares: of a CPU; None if unknown.
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

    def __post_init__(self) -> None:
        check_rates(self)
        if not self.gemm:
            raise ValueError("gemm is empty; it needs an entry at least")


@dataclass(frozen=True)
class NetworkRates:
    """Between two stages' actors. hop_seconds: of a small tensor and the word that it came."""

    hop_seconds: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)


def interpolate(table: Iterable[tuple[int, float]], number: float) -> float:
    """A rate between measured ones: straight between logarithms, as a power law is; beyond the ends
    the end's.

    table: (number, rate), numbers rising.
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
