"""Repeats measurements until they agree, and refuses those that can't be right.

Measurements are wrong while other processes, or other machines on the same host, use the cores; so
their load is watched. The module knows figures; not what is measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import Protocol

import psutil

TENTH = 0.1  # relative difference allowed between two measurements, or a part and its whole
_HASTE = ", each was measured once, because the time was up."
_REMEDY = "end other programs on this machine and calibrate again"


class LoadWatch(Protocol):
    @property
    def cores(self) -> float:
        """Mean number of cores that other processes have kept busy since this was made."""


class Unsteady(RuntimeError):
    """Unreliable measurements; the message has the figures and the remedy."""


class OtherLoad:
    """The load of processes that aren't ours since this was made, on this machine.

    Ours are this process and the ones in `pids`, with all that they have started: a Ray cluster of
    one's own, for example, and its stages. Read `cores` before these end: the seconds of a process
    whose parent didn't wait for it count as others'.
    """

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._ours = {os.getpid(), *pids}
        self._busy, self._began = self._busy_elsewhere(), time.perf_counter()

    @property
    def cores(self) -> float:
        """Mean number of cores that other processes have kept busy since."""
        seconds = time.perf_counter() - self._began
        return max((self._busy_elsewhere() - self._busy) / seconds, 0.0)

    def _busy_elsewhere(self) -> float:
        """Processor seconds since boot that were busy, but not with our processes."""
        cpu = psutil.cpu_times()
        busy = sum(cpu) - cpu.idle - cpu.iowait - cpu.guest - cpu.guest_nice
        return busy - processor_seconds(self._ours)


def processor_seconds(pids: Iterable[int]) -> float:
    """Processor seconds of these processes and all that they have started, ended ones included."""
    processes: set[psutil.Process] = set()
    seconds = 0.0
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            processes |= {process, *process.children(recursive=True)}
    for process in processes:
        # A process may end meanwhile; its parent then has its time.
        with suppress(psutil.Error):
            cpu = process.cpu_times()
            seconds += cpu.user + cpu.system + cpu.children_user + cpu.children_system
    return seconds


def name_disturbance(cores: float) -> list[str]:
    """Reason to doubt measurements beside which other processes used so many cores.

    None, an empty list, if that was at most a tenth of the machine's.
    """
    total = os.cpu_count() or 1
    return [f"others used {cores:.1f} of {total} cores"] if cores > TENTH * total else []


@dataclass
class Measurer:
    """Repeats measurements until they agree.

    announce: called once with each measurement's name. max_repeats: of one measurement; 1 takes the
    first as it is. watch: makes a watch of other processes' load. notes: sentences about
    measurements that never agreed. deadline: of time.perf_counter(), from which each thing is
    measured once.
    """

    announce: Callable[[str], None]
    max_repeats: int = 5
    watch: Callable[[], LoadWatch] = OtherLoad
    num_cores: int = os.cpu_count() or 1
    notes: list[str] = field(default_factory=list)
    deadline: float = inf

    @property
    def is_rough(self) -> bool:
        """True if things are measured once now."""
        return self.max_repeats == 1 or time.perf_counter() >= self.deadline

    def __call__(
        self, name: str, measure: Callable[[], Sequence[float]], slack: float = 0.0
    ) -> tuple[float, ...]:
        """The mean figures of the first two measurements in a row that agree.

        Two figures agree if they differ by a tenth of the larger or by slack, at most. If none
        agree, returns the median of all and adds a note.
        Raises Unsteady if other processes used the cores during nearly all of them.
        """
        self.announce(name)
        if self.is_rough:
            self._note_haste(name)
            return tuple(measure())
        accepted: list[tuple[float, ...]] = []
        loads: list[float] = []  # cores that others used during each measurement
        for _ in range(2 * self.max_repeats):
            watch = self.watch()
            figures = tuple(measure())
            loads.append(watch.cores)
            if loads[-1] > max(0.5, TENTH * self.num_cores):
                if len(loads) - len(accepted) >= self.max_repeats:
                    break
                continue
            accepted.append(figures)
            if len(accepted) > 1 and _agree(accepted[-2], accepted[-1], slack):
                return tuple(sum(pair) / 2 for pair in zip(*accepted[-2:], strict=True))
            if self.is_rough:
                self._note_haste(name)
                return accepted[-1]
            if len(accepted) == self.max_repeats:
                break
        if len(accepted) < 2:
            raise Unsteady(
                f"other processes kept {median(loads):.1f} of {self.num_cores} cores busy in "
                f"{len(loads)} measurements of {name}; {_REMEDY}"
            )
        self.notes.append(f"{name}: {len(accepted)} measurements differed by more than a tenth.")
        return tuple(median(each) for each in zip(*accepted, strict=True))

    def _note_haste(self, name: str) -> None:
        """Note from where on the time was up, unless it is noted or nothing was to be repeated."""
        if self.max_repeats > 1 and not any(it.endswith(_HASTE) for it in self.notes):
            self.notes.append(f"From {name} on{_HASTE}")

    def check_part(self, part: float, whole: float, message: str, unit: float = 1e9) -> float:
        """The part, reduced to the whole if it is slightly larger.

        Up to a tenth more is taken for an error of measurement, and anything if is_rough.
        message: a sentence with a place for the part and one for the whole, in units of `unit`.
        Raises Unsteady with that sentence if the part is larger.
        """
        if not self.is_rough and part > whole * (1 + TENTH):
            figures = message.format(f"{part / unit:.3g}", f"{whole / unit:.3g}")
            raise Unsteady(f"{figures}, but a part can't exceed the whole; {_REMEDY}")
        return min(part, whole)


def _agree(a: tuple[float, ...], b: tuple[float, ...], slack: float) -> bool:
    pairs = zip(a, b, strict=True)
    return all(abs(x - y) <= max(TENTH * max(abs(x), abs(y)), slack) for x, y in pairs)
