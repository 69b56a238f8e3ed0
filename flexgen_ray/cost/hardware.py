"""What a machine is and gives: memory, and rates by kernel, dtype and number of rows.

A YAML file says all of it: a preset of this package, one that `flexgen-ray calibrate` measured, or
one that a person wrote. Rates are per second. Knows machines; no model and no policy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log
from pathlib import Path

from flexgen_ray.config import DTYPE_BYTES, Budget, HardwareSpec
from flexgen_ray.cost.yaml_fields import Table, check_rates, check_table, read_yaml, to_yaml
from flexgen_ray.paths import hardware_file

LOCAL = "local"
_PRESETS = Path(__file__).parent.parent / "presets"
_NETWORK_BYTES_PER_S = HardwareSpec.network_bytes_per_s


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
    """Bytes of K and V that a kernel of the host attends: alone, and while the link is busy."""

    kernel: str
    dtype: str
    queries_per_kv_head: int
    bytes_per_s: float
    busy_bytes_per_s: float

    def __post_init__(self) -> None:
        check_rates(self)
        _check_dtype(self.dtype)


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
class DeviceRates:
    """launch_seconds: to issue one op. attention: bytes of K and V in decoding. dequantize: bytes
    of 16-bit values that come of packed ones, None where nothing dequantizes."""

    is_cpu: bool
    memory_bytes_per_s: float
    attention_bytes_per_s: float
    launch_seconds: float
    gemm: tuple[GemmRates, ...]
    dequantize_bytes_per_s: float | None = None

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


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine with one device. source: where the figures are from; versions: of the software
    that measured them; network: None if hops are unknown."""

    name: str
    date: str
    source: str
    notes: str = ""
    versions: dict[str, str] = field(default_factory=dict, hash=False)
    memory: MemorySizes
    link: LinkRates
    disk: DiskRates
    host: HostRates
    device: DeviceRates
    network: NetworkRates | None = None

    @property
    def budget(self) -> Budget:
        """The share of each tier's bytes that a plan may use."""
        sizes = self.memory
        return Budget(*(int(size * sizes.share) for size in (sizes.gpu, sizes.cpu, sizes.disk)))

    def rates(
        self, dtype: str, queries_per_kv_head: int, decode_rows: int, prefill_rows: int
    ) -> HardwareSpec:
        """For cost models: the best host kernel for this shape, and matrix products of so many
        rows. What the host's memory gives is what it gives to all who draw on it together.

        Raises ValueError for a dtype without figures.
        """
        network = self.network.bytes_per_s if self.network else _NETWORK_BYTES_PER_S
        return HardwareSpec(
            h2d_bytes_per_s=self.link.h2d_bytes_per_s,
            d2h_bytes_per_s=self.link.d2h_bytes_per_s,
            disk_read_bytes_per_s=self.disk.read_bytes_per_s,
            disk_write_bytes_per_s=self.disk.write_bytes_per_s,
            host_bytes_per_s=self.host.joint_bytes_per_s,
            host_attention_bytes_per_s=self.attention(dtype, queries_per_kv_head).bytes_per_s,
            device_flops_per_s=self.gemm_flops_per_s(dtype, prefill_rows),
            device_bytes_per_s=self.device.memory_bytes_per_s,
            device_decode_flops_per_s=self.gemm_flops_per_s(dtype, decode_rows),
            device_attention_bytes_per_s=self.device.attention_bytes_per_s,
            network_bytes_per_s=network,
        )

    def knows(self, dtype: str) -> bool:
        """Whether there are figures for a dtype."""
        attention = {it.dtype for it in self.host.attention}
        return dtype in attention & {it.dtype for it in self.device.gemm}

    def attention(self, dtype: str, queries_per_kv_head: int) -> AttentionRates:
        """Of the kernel that is fastest alone, between the measured shapes if need be.

        Raises ValueError for a dtype without figures.
        """
        entries = [it for it in self.host.attention if it.dtype == dtype]
        if not entries:
            raise self._lacks("host attention", dtype, (it.dtype for it in self.host.attention))
        found = []
        for kernel in dict.fromkeys(it.kernel for it in entries):
            own = {it.queries_per_kv_head: it for it in entries if it.kernel == kernel}
            alone = interpolate(
                [(at, own[at].bytes_per_s) for at in sorted(own)], queries_per_kv_head
            )
            busy = interpolate(
                [(at, own[at].busy_bytes_per_s) for at in sorted(own)], queries_per_kv_head
            )
            found.append(AttentionRates(kernel, dtype, queries_per_kv_head, alone, busy))
        return max(found, key=lambda it: it.bytes_per_s)

    def gemm_flops_per_s(self, dtype: str, rows: int) -> float:
        """Of a product with so many rows; ValueError for a dtype without figures."""
        for gemm in self.device.gemm:
            if gemm.dtype == dtype:
                return interpolate(gemm.flops_per_s, rows)
        raise self._lacks("matrix products", dtype, (gemm.dtype for gemm in self.device.gemm))

    def _lacks(self, what: str, dtype: str, known: Iterable[str]) -> ValueError:
        dtypes = ", ".join(dict.fromkeys(known))
        return ValueError(
            f"hardware {self.name} has no figures for {what} in {dtype}, only for {dtypes}; "
            "choose one of those, or add the figures to a hardware file"
        )

    @staticmethod
    def preset_names() -> list[str]:
        return sorted(path.stem for path in _PRESETS.glob("*.yaml"))

    @staticmethod
    def preset(name: str) -> Hardware:
        """A machine that ships with this package; ValueError lists the names."""
        if name not in Hardware.preset_names():
            known = ", ".join(Hardware.preset_names())
            raise ValueError(f"there is no hardware preset {name!r}; there are {known}")
        return Hardware.from_yaml(_PRESETS / f"{name}.yaml")

    @staticmethod
    def load(name: str | Path) -> Hardware:
        """A preset by its name, a file by its path, or `local`: what was measured of this node.

        Raises FileNotFoundError, with the names there are, and ValueError for bad content.
        """
        if str(name) in Hardware.preset_names():
            return Hardware.preset(str(name))
        path = hardware_file() if str(name) == LOCAL else Path(name)
        if path.is_file():
            return Hardware.from_yaml(path)
        if str(name) == LOCAL:
            raise FileNotFoundError(f"{path} is not there; `flexgen-ray calibrate` makes it")
        known = ", ".join(Hardware.preset_names())
        raise FileNotFoundError(
            f"there is no hardware file {name}, nor a preset of that name; presets are {known}, "
            "and `local` is what `flexgen-ray calibrate` measured"
        )

    @staticmethod
    def local() -> Hardware | None:
        """What `flexgen-ray calibrate` measured of this node; None if it hasn't been run."""
        return Hardware.load(LOCAL) if hardware_file().is_file() else None

    @staticmethod
    def from_yaml(path: str | Path) -> Hardware:
        """ValueError (bad content) and OSError (no such file) name the path."""
        return read_yaml(Hardware, Path(path))

    def to_yaml(self) -> str:
        """Text that `from_yaml` reads as an equal machine."""
        return to_yaml(self)


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


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}")
