"""Memory tiers of a stage: device and host memory, allocated under budgets never exceeded.

Knows bytes and where they lie; not what they mean.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from flexgen_ray.layout.placement import SECTOR
from flexgen_ray.units import format_bytes


class BudgetError(ValueError):
    """Raised when an allocation would exceed a tier's budget."""


class Ledger:
    """Bytes allocated from one tier, by purpose, against its budget."""

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.used: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Bytes allocated so far."""
        return sum(self.used.values())

    def book(self, what: str, nbytes: int) -> None:
        """Record an allocation; raises BudgetError if it would exceed the budget."""
        if self.total + nbytes > self.budget:
            raise BudgetError(
                f"{what} needs {format_bytes(nbytes)} on the {self.name} tier, where "
                f"{format_bytes(self.budget - self.total)} of {format_bytes(self.budget)} is free; "
                f"raise --{self.name}-memory"
            )
        self.used[what] = self.used.get(what, 0) + nbytes


_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_log = logging.getLogger(__name__)


def allocate_mapping(nbytes: int, is_inherited: bool = True) -> Tensor:
    """Allocate a zeroed uint8 host tensor that starts at a sector.

    It is a memory mapping of its own, which costs nothing until it is touched, and which goes back
    to the system as a whole. is_inherited: False if processes that this one forks don't have it.
    """
    if not nbytes:
        return torch.zeros(0, dtype=torch.uint8)
    mapping = mmap.mmap(-1, nbytes, _PRIVATE)
    # Huge pages are touched and pinned several times faster; not every Linux kernel has them.
    with suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    if not is_inherited:
        mapping.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(mapping, dtype=torch.uint8)


class MemoryTier(Ledger):
    """Allocates zeroed memory of a torch device; without CUDA the GPU tier is host memory too.

    pinned: pin host memory (register it with CUDA), so that copies from and to it are asynchronous.
    If CUDA refuses, a warning is logged, and those copies are slower.
    """

    def __init__(self, name: str, budget: int, device: torch.device, pinned: bool = False) -> None:
        super().__init__(name, budget)
        self.device = device
        self.pinned = pinned
        self._registered: list[Tensor] = []
        # The driver would keep memory that is unmapped while pinned until the process ends.
        self._unregister = weakref.finalize(self, _unregister, self._registered)

    def allocate(self, what: str, nbytes: int) -> Tensor:
        """Allocate a zeroed uint8 tensor of nbytes, aligned to sectors on the host.

        what: purpose, by which the bytes are recorded. Raises BudgetError beyond the budget.
        """
        self.book(what, nbytes)
        if self.device.type != "cpu":
            memory = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
            # Other streams will fill it.
            torch.cuda.synchronize(self.device)
            return memory
        # After a fork, a write may move a page away from under the device's copies.
        memory = allocate_mapping(nbytes, is_inherited=not self.pinned)
        # Touch all pages now, on all cores: not during a run, and so that missing memory shows now.
        memory[::SECTOR].zero_()
        if self.pinned and nbytes and _register(memory):
            self._registered.append(memory)
        return memory

    def close(self) -> None:
        """Wait for the device's copies and unpin the memory; allocate nothing afterwards.

        The memory stays usable until its last tensor is freed.
        """
        self.pinned = False
        self._unregister()


def _register(memory: Tensor) -> bool:
    """Pin host memory for CUDA; returns False, and logs a warning, if CUDA refuses."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error) == 0:
        return True
    _forget_last_error()
    _log.warning(
        "CUDA refuses to pin %s of host memory (%s), perhaps more than the machine or its "
        "container can: copies to and from it will be slower; lower --cpu-memory, or raise the "
        "container's memory limit",
        format_bytes(memory.nbytes),
        torch.cuda.CudaError(int(error)),
    )
    return False


def _unregister(registered: list[Tensor]) -> None:
    """Unpin all of this memory, and empty the list."""
    if not registered:
        return
    # A device that has failed makes no more copies to wait for.
    with suppress(RuntimeError):
        torch.cuda.synchronize()
    while registered:
        memory = registered.pop()
        error = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        if int(error):
            _forget_last_error()
            reason = torch.cuda.CudaError(int(error))
            _log.warning("CUDA keeps %s pinned (%s)", format_bytes(memory.nbytes), reason)


def _forget_last_error() -> None:
    """Clear CUDA's last error, which the next kernel launch would report again."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
