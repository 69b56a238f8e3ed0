"""A backend for dry runs on the machines of a hardware file, where nothing can run.

It has the calls of the other backends, so that planning needs no case of its own.
"""

from __future__ import annotations

from typing import NoReturn

from flexgen_ray.config import Deployment
from flexgen_ray.hardware.known import GIVEN
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.runtime.events import Recovery
from flexgen_ray.runtime.worker import Machine


class HardwareFileBackend:
    """One machine of the hardware file for each stage; it can be probed, but runs nothing."""

    uses_nccl = False

    def __init__(self, hardware: Hardware, deployment: Deployment) -> None:
        self._hardware = hardware
        self.num_stages = 1 if deployment.num_stages == "auto" else int(deployment.num_stages)
        self.resumes = deployment.use_ray and deployment.faults.max_restarts > 0
        self._threads = deployment.threads or 1
        self.recoveries: list[Recovery] = []

    def probe(self, device: str, offload_dir: str) -> list[Machine]:
        """The machines, with everything free that the hardware file says they have."""
        hardware, sizes = self._hardware, self._hardware.memory
        is_cpu = hardware.device.is_cpu
        # Without a GPU its tier is part of the host's memory.
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
        """Do nothing: no resource is held."""

    def abort(self) -> None:
        """Do nothing: no run is under way."""

    def _refuse(self, *_: object) -> NoReturn:
        raise RuntimeError(f"nothing runs on {self._hardware.name}, which is only planned for")

    rates = load = add = run = used = measured = spans = _refuse


def _is_fast_in_bfloat16(hardware: Hardware) -> bool:
    """True if matrix products in bfloat16 are about as fast as in float16."""
    dtypes = {gemm.dtype for gemm in hardware.device.gemm}
    if not {"bfloat16", "float16"} <= dtypes:
        return "bfloat16" in dtypes
    fast, other = (hardware.gemm_flops_per_s(it, 1024) for it in ("bfloat16", "float16"))
    return fast > other / 2
