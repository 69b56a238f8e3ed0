"""Repeats measurements until they agree, and refuses those that can't be right.

Knows figures and who else uses the cores; not what is measured.

What other processes, and other machines on the same host, take of the cores meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import psutil


class OtherLoad:
    """Counts from when it is made. `cores`: that others have kept busy since, on average; from a
    few tenths up, figures taken meanwhile mean little."""

    def __init__(self) -> None:
        self._busy, self._began = _busy_elsewhere(), time.perf_counter()

    @property
    def cores(self) -> float:
        seconds = time.perf_counter() - self._began
        return max((_busy_elsewhere() - self._busy) / seconds, 0.0)


def _busy_elsewhere() -> float:
    """Processor seconds since boot that this process didn't use and that weren't idle."""
    cpu = psutil.cpu_times()
    return sum(cpu) - cpu.idle - cpu.iowait - cpu.guest - cpu.guest_nice - time.process_time()


TENTH = 0.1  # by which two measurements, or a part and its whole, may differ
_REMEDY = "end what else runs on this machine and calibrate again"


class LoadWatch(Protocol):
    @property
    def cores(self) -> float:
        """Mean number of cores that other processes have kept busy since this was made."""


class Unsteady(RuntimeError):
    """Measurements that can't be relied on; the message has the figures and the remedy."""


@dataclass
class Measurer:
    """Takes measurements by name.

    announce: called once with each name. most: measurements of one thing; 1 takes the first as it
    is. watch: makes what counts the cores that others use. notes: what still differed in the end.
    """

    announce: Callable[[str], None]
    most: int = 5
    watch: Callable[[], LoadWatch] = OtherLoad
    num_cores: int = os.cpu_count() or 1
    notes: list[str] = field(default_factory=list)

    def __call__(
        self, name: str, measure: Callable[[], Sequence[float]], slack: float = 0.0
    ) -> tuple[float, ...]:
        """Figures of two measurements in a row that differ by a tenth, or by slack, at most; the
        median of all, and a note, if none do.

        Raises Unsteady if others used the cores during every one of them.
        """
        self.announce(name)
        if self.most == 1:
            return tuple(measure())
        found: list[tuple[float, ...]] = []
        elsewhere: list[float] = []
        for _ in range(2 * self.most):
            watch = self.watch()
            figures = tuple(measure())
            elsewhere.append(watch.cores)
            if elsewhere[-1] > max(0.5, TENTH * self.num_cores):
                if len(elsewhere) - len(found) >= self.most:
                    break
                continue
            found.append(figures)
            if len(found) > 1 and _are_close(found[-2], found[-1], slack):
                return tuple(sum(pair) / 2 for pair in zip(*found[-2:], strict=True))
            if len(found) == self.most:
                break
        if len(found) < 2:
            raise Unsteady(
                f"other processes kept {median(elsewhere):.1f} of {self.num_cores} cores busy in "
                f"{len(elsewhere)} measurements of {name}; {_REMEDY}"
            )
        self.notes.append(f"{name}: {len(found)} measurements differed by more than a tenth.")
        return tuple(median(each) for each in zip(*found, strict=True))

    def check_part(self, part: float, whole: float, what: str, unit: float = 1e9) -> float:
        """The part, cut to its whole where it is a tenth more at most, or if most is 1.

        what: words with a place for the part and one for the whole, which are divided by unit.
        Raises Unsteady with the figures if the part is larger.
        """
        if self.most > 1 and part > whole * (1 + TENTH):
            figures = what.format(f"{part / unit:.3g}", f"{whole / unit:.3g}")
            raise Unsteady(f"{figures}, but a part can't exceed its whole; {_REMEDY}")
        return min(part, whole)


def _are_close(a: tuple[float, ...], b: tuple[float, ...], slack: float) -> bool:
    pairs = zip(a, b, strict=True)
    return all(abs(x - y) <= max(TENTH * max(abs(x), abs(y)), slack) for x, y in pairs)
