"""What this machine gives a plan, resource by resource: short measurements, the best of several.

Each resource is measured alone, so a bound made of these rates is one that nothing can beat.
Knows plans; how to measure is measure.py's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flexgen_ray.config import Budget, HardwareSpec
from flexgen_ray.cost.placement import PAGE, aligned
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.models.host_kernel import Kernel
from flexgen_ray.runtime.measure import Bench, CacheShape
from flexgen_ray.store.tier import TORCH_DTYPE

FREE = 1e18  # of a resource that the run doesn't use
SECONDS = 0.3  # for each measurement
BUFFER = 256 * 2**20  # bytes; larger than any cache


def measure_rates(
    plan: StagePlan, budget: Budget, device: torch.device, offload_dir: Path, attend: Kernel
) -> HardwareSpec:
    """Rates of this process's device, links, disk and host, for the plan's shapes and dtype.

    Takes no more memory than the budget, and gives it back.
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
