"""Memory of the device and of the host, handed out under a budget.

Knows bytes and where they lie; not what they mean.

A budget that is never exceeded: what was given out, and for what. Knows bytes only.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from flexgen_ray.layout.placement import PAGE
from flexgen_ray.units import format_bytes


class BudgetError(ValueError):
    """A tier was asked for more than its budget."""


class Ledger:
    """What a tier has given out, by purpose, against its budget."""

    def __init__(self, name: str, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.used: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.used.values())

    def book(self, what: str, nbytes: int) -> None:
        """BudgetError if the tier can't take it."""
        if self.total + nbytes > self.budget:
            raise BudgetError(
                f"{what} needs {format_bytes(nbytes)} on the {self.name} tier, where "
                f"{format_bytes(self.budget - self.total)} of {format_bytes(self.budget)} is free; "
                f"raise --{self.name}-memory"
            )
        self.used[what] = self.used.get(what, 0) + nbytes


_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_log = logging.getLogger(__name__)


def allocate_pages(nbytes: int) -> Tensor:
    """A zeroed uint8 host tensor that starts at a page: a mapping of its own, which costs nothing
    until touched and is returned whole."""
    if not nbytes:
        return torch.zeros(0, dtype=torch.uint8)
    mapping = mmap.mmap(-1, nbytes, _PRIVATE)
    # Huge pages are touched and registered several times as fast; not every kernel has them.
    with suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)


class MemoryTier(Ledger):
    """Zeroed memory of a torch device; without CUDA the gpu tier is plain memory too.

    pinned: host memory is registered with CUDA, so that copies from and to it run on their own.
    Where CUDA refuses, a warning says so, and those copies are slower.
    """

    def __init__(self, name: str, budget: int, device: torch.device, pinned: bool = False) -> None:
        super().__init__(name, budget)
        self.device = device
        self.pinned = pinned
        self._registered: list[Tensor] = []
        # Memory that is unmapped while registered stays with the driver until the process ends.
        self._unregister = weakref.finalize(self, _unregister, self._registered)

    def allocate(self, what: str, nbytes: int) -> Tensor:
        """A zeroed uint8 tensor of exactly nbytes, page-aligned on the host."""
        self.book(what, nbytes)
        if self.device.type != "cpu":
            memory = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
            # Whoever fills it does so on a stream of its own.
            torch.cuda.synchronize(self.device)
            return memory
        memory = allocate_pages(nbytes)
        # Now, on all cores, and not in the midst of a run; what there isn't is missed now, too.
        memory[::PAGE].zero_()
        if self.pinned and nbytes and _register(memory):
            self._registered.append(memory)
        return memory

    def close(self) -> None:
        """Waits for the device's copies and takes the registration back; the memory stays usable
        until the last tensor of it goes. Nothing may be allocated afterwards."""
        self.pinned = False
        self._unregister()


def _register(memory: Tensor) -> bool:
    """Pins host memory for CUDA; False, and a warning, if CUDA refuses."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(error) == 0:
        return True
    _forget_last_error()
    _log.warning(
        "CUDA refuses to pin %s of host memory (%s): copies to and from it will be slower; "
        "raise the limit on locked memory (ulimit -l) or lower --cpu-memory",
        format_bytes(memory.nbytes),
        torch.cuda.CudaError(int(error)),
    )
    return False


def _unregister(registered: list[Tensor]) -> None:
    if not registered:
        return
    # A device that has failed copies nothing any more.
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
    """The next kernel launch reports any error since the last one, though it was handled."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
