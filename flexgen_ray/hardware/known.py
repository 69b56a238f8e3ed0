"""The rates of this node that are known before a run: calibrated, or assumed by its GPU's name."""

from __future__ import annotations

import time
from pathlib import Path

from flexgen_ray.hardware.rates import DiskRates, MemorySizes
from flexgen_ray.hardware.spec import Hardware, adapt_preset, find_preset
from flexgen_ray.store.disk import DiskTier
from flexgen_ray.store.memory import allocate_mapping

# Sources of a machine's rates: `flexgen-ray calibrate`, a preset for its GPU, a hardware file.
CALIBRATED, ASSUMED, GIVEN = "calibrated", "assumed", "given"
_DISK_BYTES = 64 * 2**20  # bytes written and read to measure a disk


def load_calibrated(uses_cuda: bool) -> Hardware | None:
    """Rates of this node as `flexgen-ray calibrate` measured them.

    None if it hasn't been run here, or for another kind of device than uses_cuda says.
    """
    hardware = Hardware.local()
    return hardware if hardware is not None and hardware.device.is_cpu != uses_cuda else None


def assume_from_preset(
    device_name: str, memory: MemorySizes, cores: int, offload_dir: Path
) -> Hardware | None:
    """The preset for this GPU, with the node's own memory, cores and disk, if there is one."""
    preset = find_preset(device_name)
    if preset is None:
        return None
    return adapt_preset(preset, memory, cores, measure_disk(offload_dir, memory.disk))


def measure_disk(folder: Path, free: int) -> DiskRates | None:
    """Rates of a folder's disk, measured in about a second.

    free: bytes free there. None if that is too little, if the disk fails, or if the file system
    can't bypass the page cache, whose rates would be memory's.
    """
    if free < 8 * _DISK_BYTES:
        return None
    buffer, tier = allocate_mapping(_DISK_BYTES).fill_(1), DiskTier(_DISK_BYTES, folder)
    try:
        region = tier.allocate("a measurement", _DISK_BYTES)
        if not region.is_direct:
            return None
        started = time.perf_counter()
        region.write(buffer)
        written = time.perf_counter()
        region.read_into(buffer)
        read = time.perf_counter()
    except OSError:
        return None
    finally:
        tier.close()
    return DiskRates(_DISK_BYTES / (read - written), _DISK_BYTES / (written - started))
