"""Machines of a hardware file in place of this one, to plan for: nothing can run there."""

from __future__ import annotations

from typing import NoReturn

from flexgen_ray.config import Deployment
from flexgen_ray.hardware.known import GIVEN
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.runtime.events import Recovery
from flexgen_ray.runtime.worker import Machine


class HardwareFileBackend:
    """A backend of one such machine a stage, which only knows what it would be."""

    uses_nccl = False

    def __init__(self, hardware: Hardware, wanted: Deployment) -> None:
        self._hardware = hardware
        self.num_stages = 1 if wanted.num_stages == "auto" else int(wanted.num_stages)
        self.resumes = wanted.use_ray and wanted.faults.max_restarts > 0
        self._threads = wanted.threads or 1
        self.recoveries: list[Recovery] = []

    def probe(self, device: str, offload_dir: str) -> list[Machine]:
        """Each with all that the hardware file says it has."""
        hardware, sizes = self._hardware, self._hardware.memory
        is_cpu = hardware.device.is_cpu
        # Without a GPU its tier is part of the same memory.
        memory = sizes.cpu + sizes.gpu if is_cpu else sizes.cpu
        return [
            Machine(
                host=f"{hardware.name}, node {number}",
                device="cpu" if is_cpu else "cuda",
                device_name=hardware.name,
                gpu_bytes=memory if is_cpu else sizes.gpu,
                cpu_bytes=memory,
                disk_bytes=sizes.disk,
                num_threads=self._threads,
                is_fast_in_bfloat16=not is_cpu and _is_fast_in_bfloat16(hardware),
                hardware=hardware,
                gpu_id=str(number),
                rates_source=GIVEN,
            )
            for number in range(self.num_stages)
        ]

    def close(self) -> None:
        """Nothing was taken."""

    def abort(self) -> None:
        """Nothing runs."""

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError(f"nothing runs on {self._hardware.name}, which is only planned for")

    rates = load = add = run = used = measured = spans = _refuse


def _is_fast_in_bfloat16(hardware: Hardware) -> bool:
    """True if matrix products in it are about as fast as in float16."""
    known = {it.dtype for it in hardware.device.gemm}
    if not {"bfloat16", "float16"} <= known:
        return "bfloat16" in known
    fast, other = (hardware.gemm_flops_per_s(it, 1024) for it in ("bfloat16", "float16"))
    return fast > other / 2
