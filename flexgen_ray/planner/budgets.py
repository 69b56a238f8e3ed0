"""Defaults for what a run may use: budgets from free memory, the dtype from the machine.

The module refuses, with the numbers, what the machine doesn't have. It knows no model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from flexgen_ray.config import Budget
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.schedule.ops import Lane
from flexgen_ray.units import format_bytes

# Shares of what is free that a run takes if no limit is set.
GPU_SHARE = 0.9
HOST_SHARE = 0.8
DISK_SHARE = 0.9
# Bytes of GPU memory for the allocator's rounding, and for cuBLAS, which has a workspace for each
# stream that multiplies; those on GPUs from Hopper on are the largest.
_ROUNDING, _WORKSPACE = 32 * 2**20, 32 * 2**20
CUDA_RESERVE = _ROUNDING + sum(lane.worker is Lane.DEVICE for lane in Lane) * _WORKSPACE
# Bytes of GPU memory that NCCL is taken to need for its buffers on each edge of a stage.
NCCL_EDGE = 256 * 2**20


def settle_budgets(
    machines: list[Machine], limits: dict[str, int | None], reserved: int, uses_nccl: bool = False
) -> list[Budget]:
    """The budget of each stage.

    Stages on one host divide its memory, its disk and the bytes reserved there; a limit on those is
    the host's. A limit on GPU memory is each stage's own; stages on one GPU divide its free memory.

    limits: {tier: bytes, or None for a share of what is free}. reserved: bytes of host memory that
    Ray's object store takes. uses_nccl: hidden states go from GPU to GPU, by buffers of NCCL's.
    Raises ValueError if a limit exceeds what is free.
    """
    if uses_nccl:
        machines = [_less_nccl(it, stage, len(machines)) for stage, it in enumerate(machines)]
    hosts = Counter(machine.host for machine in machines)
    gpus = Counter(machine.gpu_id for machine in machines)
    return [_settle_share(it, limits, reserved, hosts[it.host], gpus[it.gpu_id]) for it in machines]


def _less_nccl(machine: Machine, stage: int, num_stages: int) -> Machine:
    """The machine without the GPU memory of NCCL's buffers, on the stage's one or two edges."""
    taken = NCCL_EDGE * ((stage > 0) + (stage < num_stages - 1))
    return replace(machine, gpu_bytes=max(machine.gpu_bytes - taken, 0))


def library_note(machines: list[Machine], gpu_limit: int | None, uses_nccl: bool) -> str | None:
    """A note for people who set a limit on GPU memory: what comes on top of it; None if nothing.

    CUDA's context isn't counted, because a process can't know what it had before it had one.
    """
    taken = max(machine.library_bytes for machine in machines)
    if gpu_limit is None or not (taken or uses_nccl):
        return None
    parts = [f"{format_bytes(taken)} of kernels of CUDA's libraries"] if taken else []
    if uses_nccl:
        parts.append(f"about {format_bytes(NCCL_EDGE)} of NCCL's for each neighbour")
    return (
        f"beside --gpu-memory {format_bytes(gpu_limit)}, each GPU holds {', '.join(parts)}, and "
        "CUDA's context of a few hundred MiB; lower --gpu-memory if others need that memory"
    )


def _settle_share(
    machine: Machine, limits: dict[str, int | None], reserved: int, num_stages: int, on_gpu: int
) -> Budget:
    """The budget of one of num_stages stages on a host, on_gpu of which use the same GPU."""
    if num_stages == 1:
        return settle_budget(machine, limits, reserved)
    gpu = machine.gpu_bytes // on_gpu if machine.on_cuda else machine.cpu_bytes // num_stages
    share = replace(
        machine,
        gpu_bytes=gpu,
        cpu_bytes=machine.cpu_bytes // num_stages,
        disk_bytes=machine.disk_bytes // num_stages,
    )
    of_host = {tier: limits[tier] for tier in ("cpu", "disk")}
    shared = {tier: size if size is None else size // num_stages for tier, size in of_host.items()}
    try:
        return settle_budget(share, limits | shared, reserved // num_stages)
    except ValueError as error:
        raise ValueError(f"each of the {num_stages} stages on one host: {error}") from error


def settle_budget(machine: Machine, limits: dict[str, int | None], reserved: int) -> Budget:
    """The limits as they stand; for a tier without one, what is free less a margin for others.

    Without CUDA the gpu tier is host memory too, so the two tiers share what is free.
    """
    gpu, cpu, disk = limits["gpu"], limits["cpu"], limits["disk"]
    disk = int(machine.disk_bytes * DISK_SHARE) if disk is None else disk
    host = int(machine.cpu_bytes * HOST_SHARE)
    if machine.on_cuda:
        gpu = int(machine.gpu_bytes * GPU_SHARE) if gpu is None else gpu
        cpu = host if cpu is None else cpu
    else:
        gpu = max(min(host // 2, host - (cpu or 0)), 0) if gpu is None else gpu
        cpu = max(host - gpu, 0) if cpu is None else cpu
        if gpu + cpu > machine.cpu_bytes:
            raise ValueError(
                f"--gpu-memory {format_bytes(gpu)} and --cpu-memory {format_bytes(cpu)} are both "
                f"plain memory on {machine.host}, which has no GPU, and together more than the "
                f"{format_bytes(machine.cpu_bytes)} free; lower one"
            )
    if cpu < reserved:
        raise ValueError(
            f"--cpu-memory {format_bytes(cpu)} is less than the {format_bytes(reserved)} that "
            "Ray's object store takes; raise it, or use --no-use-ray"
        )
    for tier, size, free in (
        ("gpu", gpu, machine.gpu_bytes),
        ("cpu", cpu, machine.cpu_bytes),
        ("disk", disk, machine.disk_bytes),
    ):
        if size > free:
            raise ValueError(
                f"--{tier}-memory {format_bytes(size)} is more than the {format_bytes(free)} free "
                f"on {machine.host}; lower it"
            )
    if machine.on_cuda:
        gpu = max(gpu - CUDA_RESERVE, 0)
    return Budget(gpu, cpu - reserved, disk)


def settle_dtype(
    requested: str, checkpoint: str, machines: list[Machine], overflows_float16: bool = False
) -> tuple[str, str | None]:
    """The dtype, and a note for people if it is narrower or wider than they may expect.

    requested: "auto" takes the checkpoint's dtype on a GPU; on a CPU it takes float32, or bfloat16
    if the checkpoint is in it and all machines are fast in it.
    overflows_float16: the model's activations exceed float16's range, so auto takes bfloat16, or
    else float32. Raises ValueError for an unknown dtype, and for float16 in this case.
    """
    if requested not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {requested!r} is unknown; use auto, float32, float16 or bfloat16")
    if requested == "float16" and overflows_float16:
        raise ValueError(
            "activations of this family of models exceed 65504, the largest number in float16, or "
            "are not known to stay below; use --dtype bfloat16 or float32"
        )
    if requested != "auto":
        return requested, None
    are_fast = all(machine.is_fast_in_bfloat16 for machine in machines)
    if not machines[0].on_cuda:
        is_bfloat16 = checkpoint == "bfloat16" and are_fast
        return "bfloat16" if is_bfloat16 else "float32", None
    if checkpoint == "float16" and overflows_float16 and are_fast:
        return "bfloat16", None
    if checkpoint == "float32" or are_fast:
        return checkpoint, None
    return _without_bfloat16(checkpoint, machines, overflows_float16)


def _without_bfloat16(
    checkpoint: str, machines: list[Machine], overflows_float16: bool
) -> tuple[str, str | None]:
    """The dtype and the note for a half-precision checkpoint on GPUs without fast bfloat16."""
    slow = next(machine for machine in machines if not machine.is_fast_in_bfloat16)
    reason = f"{slow.device_name} on {slow.host} has no fast bfloat16"
    if overflows_float16:
        return "float32", (
            f"{reason}, and this family's activations may exceed float16: the run takes "
            "float32, at twice the memory"
        )
    if checkpoint == "float16":
        return "float16", None
    return "float16", (
        f"{reason}, the checkpoint's dtype: the run takes float16, in which a request whose "
        "activations exceed 65504 fails; --dtype float32 avoids that, at twice the memory"
    )
