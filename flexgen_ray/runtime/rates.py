"""What this machine gives, resource by resource: short measurements, the best of several.

Each resource is measured alone, so a bound made of these rates is one that nothing can beat.
Knows shapes and devices; not schedules.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flexgen_ray.config import Budget, HardwareSpec
from flexgen_ray.cost.placement import PAGE, aligned
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.models.layers import product
from flexgen_ray.store.disk import DiskTier
from flexgen_ray.store.memory import MemoryTier
from flexgen_ray.store.weights import TORCH_DTYPE

FREE = 1e18  # of a resource that the run doesn't use
SECONDS = 0.3  # for each measurement
BUFFER = 256 * 2**20  # bytes; larger than any cache
Attend = Callable[[Tensor, Tensor, Tensor, list[int], Tensor], None]


def measure_rates(
    plan: StagePlan, budget: Budget, device: torch.device, offload_dir: Path, attend: Attend
) -> HardwareSpec:
    """Rates of this process's device, links, disk and host, for the plan's shapes and dtype.

    Takes no more memory than the budget, and gives it back.
    """
    nbytes = aligned(min(BUFFER, (budget.cpu + budget.gpu) // 6), PAGE)
    host = MemoryTier("cpu", nbytes, torch.device("cpu"), pinned=device.type == "cuda")
    try:
        memory = host.allocate("rates", nbytes).fill_(1)
        on_device = torch.ones(nbytes, dtype=torch.uint8, device=device)
        write, read = _disk(offload_dir, memory) if budget.disk >= nbytes else (FREE, FREE)
        reading = _read(memory, torch.device("cpu"))
        return HardwareSpec(
            h2d_bytes_per_s=_rate(nbytes, lambda: on_device.copy_(memory), device),
            d2h_bytes_per_s=_rate(nbytes, lambda: memory.copy_(on_device), device),
            disk_read_bytes_per_s=read,
            disk_write_bytes_per_s=write,
            host_bytes_per_s=reading,
            host_attention_bytes_per_s=_attention(plan, attend, nbytes),
            device_flops_per_s=_flops(plan, plan.tile_tokens, device, nbytes),
            device_bytes_per_s=reading if device.type == "cpu" else _read(on_device, device),
            device_decode_flops_per_s=_flops(plan, plan.policy.gpu_batch_size, device, nbytes),
        )
    finally:
        host.close()


def _rate(amount: float, action: Callable[[], object], device: torch.device) -> float:
    """Amount per second of the fastest run; a first one, which may compile, is left out."""
    action()
    best, deadline = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < deadline or best == float("inf"):
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return amount / best


def _read(memory: Tensor, device: torch.device) -> float:
    values = memory.view(torch.float32)
    return _rate(memory.nbytes, values.sum, device)


def _flops(plan: StagePlan, tokens: int, device: torch.device, nbytes: int) -> float:
    """Of the largest matrix product of a layer, its weights read from memory anew each time."""
    config, dtype = plan.config, TORCH_DTYPE[plan.dtype]
    shape = config.intermediate_size, config.hidden_size
    copies = max(1, nbytes // (shape[0] * shape[1] * dtype.itemsize))
    weights = torch.zeros(copies, *shape, dtype=dtype, device=device)
    x = torch.zeros(tokens, config.hidden_size, dtype=dtype, device=device)

    def multiply() -> None:
        for weight in weights:
            product(x, weight)

    return _rate(2.0 * tokens * weights.numel(), multiply, device)


def _attention(plan: StagePlan, attend: Attend, nbytes: int) -> float:
    """Bytes of K and V a second, of as many rows as there are to attend, at full length."""
    config, dtype = plan.config, TORCH_DTYPE[plan.dtype]
    rows = max(plan.attended_rows, 1)
    copies = max(1, nbytes // (rows * plan.row_bytes))
    shape = (copies, 2, rows, config.num_kv_heads, plan.max_seq_len, config.head_dim)
    caches = torch.zeros(shape, dtype=dtype)
    q = torch.zeros(rows, config.num_heads, config.head_dim, dtype=dtype)
    lens, out = [plan.max_seq_len] * rows, torch.empty_like(q)

    def attend_all() -> None:
        for k, v in caches:
            attend(q, k, v, lens, out)

    return _rate(caches.nbytes, attend_all, torch.device("cpu"))


def _disk(folder: Path, memory: Tensor) -> tuple[float, float]:
    """Bytes a second written, then read."""
    nbytes = memory.nbytes
    tier = DiskTier(nbytes, folder)
    try:
        region = tier.allocate("rates", nbytes)
        host = torch.device("cpu")
        write = _rate(nbytes, lambda: region.write(memory), host)
        return write, _rate(nbytes, lambda: region.read_into(memory), host)
    finally:
        tier.close()
