"""Leftovers of a machine's resources, for ops that Python begins too late.

An emulated op that is begun late catches up: it has what it could have had since it was ready. The
ops that ran meanwhile are not slowed by it in hindsight, so it may take only what they left, or
together they would have more of a resource than there is. Knows shares and modelled seconds; no
clock and no op.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from operator import itemgetter

REMEMBERED = 256  # changes of the load; what was left before them is lost
ROUNDING = 1e-9  # of a resource; less than that is none


class Spare:
    """The load of each resource from each of its latest changes on; 1 is all that there is."""

    def __init__(self) -> None:
        self._changes: list[tuple[float, dict[str, float]]] = []

    def note(self, now: float, load: dict[str, float]) -> None:
        """Take the load from now on; times never decrease."""
        if len(self._changes) >= REMEMBERED:
            del self._changes[: REMEMBERED // 2]
        self._changes.append((now, load))

    def use(
        self, shares: Mapping[str, float], seconds: float, since: float, now: float
    ) -> tuple[float, float]:
        """Give an op the rest of its resources from `since` until now, or until it ends.

        shares, seconds: as in resources.Demand. Returns the seconds alone that the op still needs,
        and the time until which it ran: `now`, or its end if it needs none.
        """
        if seconds <= 0:
            return 0.0, since
        first = max(bisect_right(self._changes, since, key=itemgetter(0)) - 1, 0)
        changes = self._changes[first:]
        del self._changes[first:]
        ends = [began for began, _ in changes[1:]] + [now]
        for (began, load), end in zip(changes, ends, strict=True):
            at = max(began, since)
            free = self._free(shares, load) if seconds > 0 and at < end else 0.0
            if not free:
                self._changes.append((began, load))
                continue
            until = min(end, at + seconds / free)
            taken = {name: each + free * shares.get(name, 0.0) for name, each in load.items()}
            if began < at:
                self._changes.append((began, load))
            self._changes.append((at, taken))
            if until < end:
                self._changes.append((until, load))
            seconds -= (until - at) * free
            if until < end or seconds <= 0:
                seconds, now = 0.0, until
        return seconds, now

    @staticmethod
    def _free(shares: Mapping[str, float], load: Mapping[str, float]) -> float:
        """The speed that an op may have beside this load without slowing others."""
        free = min((1.0, *((1 - load[it]) / share for it, share in shares.items())))
        return free if free > ROUNDING else 0.0
