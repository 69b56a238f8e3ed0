"""GPU memory beside a stage's own: measured where it can be, else counted, and said."""

from __future__ import annotations

import pytest
import torch

from flexgen_ray.hardware import gpu_memory
from flexgen_ray.layout.placement import SECTOR
from flexgen_ray.planner.budgets import (
    CUDA_RESERVE,
    GPU_SHARE,
    NCCL_EDGE,
    library_note,
    settle_budgets,
)
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.store import memory
from flexgen_ray.store.memory import MemoryTier

MIB = 2**20
NO_LIMITS = dict.fromkeys(("gpu", "cpu", "disk"))


def machine(gpu: str = "a", library_bytes: int = 0) -> Machine:
    sizes = 16 * 1024 * MIB, 64 * 1024 * MIB, 512 * 1024 * MIB
    return Machine("host", "cuda", "card", *sizes, 8, True, None, gpu, "", library_bytes)


def test_what_libraries_take_at_first_use_is_what_torchs_allocator_does_not_hold(monkeypatch):
    """The first product loads 300 MiB of kernels, and has a workspace of 32 MiB from torch."""
    held = {"libraries": 0, "torch": 16 * MIB}
    multiply = gpu_memory.linear

    def first_product(*args):
        held.update(libraries=300 * MIB, torch=48 * MIB)
        return multiply(*args)

    def free_and_total(device=None) -> tuple[int, int]:
        return 1024 * MIB - 100 * MIB - sum(held.values()), 1024 * MIB

    monkeypatch.setattr(gpu_memory, "linear", first_product)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: held["torch"])
    cpu = torch.device("cpu")
    gpu_memory.load_libraries.cache_clear()
    try:
        # The second LLM of a process is told too, though nothing is loaded for it.
        assert [gpu_memory.load_libraries(cpu) for _ in range(2)] == [300 * MIB] * 2
    finally:
        gpu_memory.load_libraries.cache_clear()


def test_buffers_of_nccl_are_left_out_of_what_is_free():
    machines = [machine(gpu) for gpu in "abc"]
    budgets = settle_budgets(machines, NO_LIMITS, 0, uses_nccl=True)
    for budget, edges in zip(budgets, (1, 2, 1), strict=True):
        free = machines[0].gpu_bytes - edges * NCCL_EDGE
        assert budget.gpu == int(free * GPU_SHARE) - CUDA_RESERVE
    limits = NO_LIMITS | {"gpu": machines[0].gpu_bytes - NCCL_EDGE}
    with pytest.raises(ValueError, match=r"--gpu-memory 15.8 GiB is more than the 15.5 GiB free"):
        settle_budgets(machines, limits, 0, uses_nccl=True)


def test_who_limits_gpu_memory_is_told_what_comes_on_top():
    machines = [machine(library_bytes=taken * MIB) for taken in (300, 512)]
    note = library_note(machines, 2**34, uses_nccl=True)
    assert note is not None
    for part in ("--gpu-memory 16.0 GiB", "512.0 MiB", "256.0 MiB of NCCL's", "lower"):
        assert part in note
    assert library_note(machines, None, uses_nccl=True) is None
    assert library_note([machine()], 2**34, uses_nccl=False) is None


def flags_of(address: int) -> list[str]:
    """The kernel's flags of the mapping that an address lies in."""
    is_here = False
    with open("/proc/self/smaps", encoding="ascii") as lines:
        for name, *values in map(str.split, lines):
            if not name.endswith(":"):
                first, last = (int(bound, 16) for bound in name.split("-"))
                is_here = first <= address < last
            elif is_here and name == "VmFlags:":
                return values
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("pinned", [True, False])
def test_only_memory_to_be_pinned_is_left_out_of_forked_processes(pinned, monkeypatch):
    monkeypatch.setattr(memory, "_register", lambda pages: False)
    pages = MemoryTier("cpu", MIB, torch.device("cpu"), pinned).allocate("test", 3 * SECTOR)
    assert ("dc" in flags_of(pages.data_ptr())) is pinned
