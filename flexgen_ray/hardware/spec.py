"""A machine's description: memory, and rates by kernel, dtype and number of rows.

A YAML file holds all of it: a preset of this package, a file that `flexgen-ray calibrate` measured,
or one that a person wrote. `Hardware.rates` reduces it to the HardwareSpec that cost models need,
for one model and one shape of batches. A machine with a known GPU that was never calibrated takes
the rates of that GPU's preset (`find_preset`, `adapt_preset`).

The module knows machines; it knows no model and no policy, and measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flexgen_ray.config import DTYPE_BYTES, Budget, HardwareSpec
from flexgen_ray.files.yaml import read_yaml, to_yaml
from flexgen_ray.hardware.rates import (
    ISSUE_SECONDS,
    AttentionRates,
    DeviceRates,
    DiskRates,
    HostRates,
    LinkRates,
    MemorySizes,
    NetworkRates,
    interpolate,
)
from flexgen_ray.paths import hardware_file
from flexgen_ray.quant.packing import GROUP, packed_bytes

LOCAL = "local"
_PRESETS = Path(__file__).parent / "presets"
# Defaults for rates that were not measured.
_NETWORK_BYTES_PER_S = HardwareSpec.network_bytes_per_s
_UNLIMITED = HardwareSpec.elementwise_bytes_per_s
_SAMPLED_BY_A_CPU = 2e7  # values per second
# Assumed: a thread of two CPUs put new keys and values in place at 3.8 to 6.9 GB/s, with a cache
# row apart for each head.
_APPENDED_BY_A_THREAD = 4.5e9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine with one device.

    date, source: day and origin of the figures. versions: {package: version} of the software that
    measured them. network: None if hops between actors were not measured.
    """

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
        self,
        dtype: str,
        queries_per_kv_head: int,
        decode_rows: int,
        prefill_rows: int,
        cache_bits: int | None = None,
    ) -> HardwareSpec:
        """The rates that cost models need, for one model and one shape of batches.

        Host attention has the rate of its fastest kernel, and host memory the rate that it gives
        to the link and to host attention together. If attention on quantized caches was not
        measured, a value is taken to need as long as an unquantized one.

        queries_per_kv_head: query heads for each KV head. decode_rows, prefill_rows: rows of
        matrix products in both phases.
        Raises ValueError for a dtype without figures.
        """
        network = self.network.bytes_per_s if self.network else _NETWORK_BYTES_PER_S
        return HardwareSpec(
            h2d_bytes_per_s=self.link.h2d_bytes_per_s,
            d2h_bytes_per_s=self.link.d2h_bytes_per_s,
            disk_read_bytes_per_s=self.disk.read_bytes_per_s,
            disk_write_bytes_per_s=self.disk.write_bytes_per_s,
            host_bytes_per_s=self.host.joint_bytes_per_s,
            host_attention_bytes_per_s=self._host_attention_bytes_per_s(
                dtype, queries_per_kv_head, cache_bits
            ),
            device_flops_per_s=self.gemm_flops_per_s(dtype, prefill_rows),
            device_bytes_per_s=self.device.memory_bytes_per_s,
            device_decode_flops_per_s=self.gemm_flops_per_s(dtype, decode_rows),
            device_attention_bytes_per_s=self.device.attention_bytes_per_s,
            dequantize_bytes_per_s=self.device.dequantize_bytes_per_s or 0.0,
            device_ops_per_s=self._device_ops_per_s,
            elementwise_bytes_per_s=self.device.elementwise_bytes_per_s or _UNLIMITED,
            sampled_values_per_s=self._sampled_values_per_s,
            network_bytes_per_s=network,
            **self._of_a_gpu,
        )

    @property
    def _of_a_gpu(self) -> dict[str, Any]:
        """Fields of a GPU alone: the thread that issues its ops, copy engines, appending.

        A CPU that is the device appends at the speed of its memory.
        """
        if self.device.is_cpu:
            return {}
        return {
            "launch_seconds": self.device.launch_seconds,
            "issue_seconds": self.device.issue_seconds or ISSUE_SECONDS,
            "has_copy_engines": True,
            "append_bytes_per_s": _APPENDED_BY_A_THREAD,
        }

    @property
    def core_shares(self) -> tuple[tuple[str, float], ...]:
        """Pairs of a lane or resource and the fraction of the cores that it occupies.

        Empty where the cores are not the device, or the fractions are unknown.
        """
        shares = self.device.core_shares
        if shares is None:
            return ()
        return (
            ("device", 1.0),
            ("h2d", shares.copies),
            ("d2h", shares.copies),
            ("disk_read", shares.disk),
            ("disk_write", shares.disk),
            ("host_attention", shares.attention),
        )

    @property
    def _device_ops_per_s(self) -> float:
        """Small ops per second of a CPU; with a GPU it is their launches that take time."""
        if not self.device.is_cpu:
            return HardwareSpec.device_ops_per_s
        return 1 / self.device.launch_seconds

    @property
    def _sampled_values_per_s(self) -> float:
        default = _SAMPLED_BY_A_CPU if self.device.is_cpu else _UNLIMITED
        return self.device.sampled_values_per_s or default

    def has_rates_for(self, dtype: str) -> bool:
        """True if a model can be planned in this dtype: both of its kinds of rates are known."""
        attention = {it.dtype for it in self.host.attention}
        return dtype in attention & {it.dtype for it in self.device.gemm}

    def _host_attention_bytes_per_s(
        self, dtype: str, queries_per_kv_head: int, cache_bits: int | None
    ) -> float:
        """Bytes of the cache per second, as it is kept: quantized, if cache_bits is not None."""
        packed = f"int{cache_bits}"
        if any(it.dtype == packed for it in self.host.attention):
            return self.attention(packed, queries_per_kv_head).bytes_per_s
        rate = self.attention(dtype, queries_per_kv_head).bytes_per_s
        if cache_bits is None:
            return rate
        return rate * packed_bytes(GROUP, cache_bits) / (GROUP * DTYPE_BYTES[dtype])

    def attention(self, dtype: str, queries_per_kv_head: int) -> AttentionRates:
        """Rates of the host kernel that is fastest alone, interpolated between measured shapes.

        Raises ValueError for a dtype without figures.
        """
        entries = [it for it in self.host.attention if it.dtype == dtype]
        if not entries:
            known = (it.dtype for it in self.host.attention)
            raise self._no_figures_error("host attention", dtype, known)
        kernels = []
        for kernel in dict.fromkeys(it.kernel for it in entries):
            own = {it.queries_per_kv_head: it for it in entries if it.kernel == kernel}
            measured = [own[heads] for heads in sorted(own)]
            alone = [(it.queries_per_kv_head, it.bytes_per_s) for it in measured]
            busy = [(it.queries_per_kv_head, it.busy_bytes_per_s) for it in measured]
            rates = (interpolate(table, queries_per_kv_head) for table in (alone, busy))
            kernels.append(AttentionRates(kernel, dtype, queries_per_kv_head, *rates))
        return max(kernels, key=lambda it: it.bytes_per_s)

    def gemm_flops_per_s(self, dtype: str, rows: float) -> float:
        """Rate of a matrix product with so many rows; ValueError for a dtype without figures."""
        for gemm in self.device.gemm:
            if gemm.dtype == dtype:
                return interpolate(gemm.flops_per_s, rows)
        known = (gemm.dtype for gemm in self.device.gemm)
        raise self._no_figures_error("matrix products", dtype, known)

    def _no_figures_error(self, what: str, dtype: str, known: Iterable[str]) -> ValueError:
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
        """A machine that ships with this package; for an unknown name, ValueError lists all."""
        if name not in Hardware.preset_names():
            known = ", ".join(Hardware.preset_names())
            raise ValueError(f"there is no hardware preset {name!r}; there are {known}")
        return Hardware.from_yaml(_PRESETS / f"{name}.yaml")

    @staticmethod
    def load(name: str | Path) -> Hardware:
        """A preset by its name, a file by its path, or `local`: this node as it was measured.

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
        near = get_close_matches(str(name), Hardware.preset_names(), n=1, cutoff=0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        raise FileNotFoundError(
            f"there is no hardware file {name}, nor a preset of that name; {meant}presets are "
            f"{known}, and `local` is what `flexgen-ray calibrate` measured"
        )

    @staticmethod
    def local() -> Hardware | None:
        """This node as `flexgen-ray calibrate` measured it; None if it hasn't been run here."""
        return Hardware.load(LOCAL) if hardware_file().is_file() else None

    @staticmethod
    def from_yaml(path: str | Path) -> Hardware:
        """Read a hardware file; ValueError (bad content) and OSError (no such file) name it."""
        try:
            return read_yaml(Hardware, Path(path))
        except ValueError as error:
            raise ValueError(
                f"{error}. If another version wrote it, measure that machine again: `flexgen-ray "
                "calibrate`"
            ) from error

    def to_yaml(self) -> str:
        """Text that `from_yaml` reads as an equal machine."""
        return to_yaml(self)


# {regular expression of torch's name for a GPU, such as "NVIDIA A100-SXM4-80GB": preset}. Laptops,
# slices of a GPU and Grace hosts differ too much.
_GPUS = {
    r"(NVIDIA )?Tesla T4|NVIDIA T4": "t4",
    r"NVIDIA L4": "l4",
    r"NVIDIA A10G": "a10g",
    r"NVIDIA RTX A5000": "a5000",
    r"NVIDIA GeForce RTX 3090": "rtx3090",
    r"NVIDIA GeForce RTX 4090( D)?": "rtx4090",
    r"NVIDIA GeForce RTX 5090": "rtx5090",
    r"NVIDIA A100[- ][-\w ]*": "a100-80",
    r"NVIDIA H100([- ][-\w ]*)?": "h100",
    r"NVIDIA H200([- ][-\w ]*)?": "h200",
}
_CORES = 8  # cores that reach the full rate of a preset's host memory


def find_preset(device_name: str) -> Hardware | None:
    """The preset whose GPU torch calls by this name; None if there is none."""
    if " MIG " in device_name:
        return None
    names = [name for gpu, name in _GPUS.items() if re.fullmatch(gpu, device_name)]
    return Hardware.preset(names[0]) if names else None


def adapt_preset(
    preset: Hardware, memory: MemorySizes, cores: int, disk: DiskRates | None
) -> Hardware:
    """The preset with a machine's own memory, number of cores and, if measured, disk.

    With few cores, host memory and host attention are slower in proportion.
    """
    share = min(cores / _CORES, 1)

    def slower(rates: AttentionRates) -> AttentionRates:
        alone, busy = rates.bytes_per_s * share, rates.busy_bytes_per_s * share
        return replace(rates, bytes_per_s=alone, busy_bytes_per_s=busy)

    flops = preset.host.flops_per_s
    host = HostRates(
        preset.host.read_bytes_per_s * share,
        max(preset.host.joint_bytes_per_s * share, preset.link.h2d_bytes_per_s),
        tuple(map(slower, preset.host.attention)),
        None if flops is None else flops * share,
    )
    return replace(preset, memory=memory, host=host, disk=disk or preset.disk)
