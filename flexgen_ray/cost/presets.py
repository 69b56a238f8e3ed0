"""Rates of a machine that was never calibrated: those of the preset for its GPU, by the GPU's name.

Knows names and cores; measures nothing.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flexgen_ray.cost.hardware import Hardware
from flexgen_ray.cost.machine_rates import AttentionRates, DiskRates, HostRates, MemorySizes

# Names by which torch knows a preset's GPU, such as "NVIDIA A100-SXM4-80GB". The H200 has the
# H100's cores and more memory bandwidth. Laptops, slices of a GPU and Grace hosts differ.
_GPUS = {
    r"(NVIDIA )?Tesla T4|NVIDIA T4": "t4",
    r"NVIDIA GeForce RTX 4090( D)?": "rtx4090",
    r"NVIDIA A100[- ][-\w ]*": "a100-80",
    r"NVIDIA H[12]00([- ][-\w ]*)?": "h100",
}
_CORES = 8  # that draw all of what a preset's host memory gives


def preset_for(device_name: str) -> Hardware | None:
    """The preset whose GPU torch calls by this name; None if there is none."""
    if " MIG " in device_name:
        return None
    names = [name for gpu, name in _GPUS.items() if re.fullmatch(gpu, device_name)]
    return Hardware.preset(names[0]) if names else None


def adapted(preset: Hardware, memory: MemorySizes, cores: int, disk: DiskRates | None) -> Hardware:
    """The preset with a machine's own memory, cores and, if it was measured, disk."""
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
