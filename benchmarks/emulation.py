"""Emulated hardware: real ops and tokens, but no op ends before its modelled end.

An op starts, in emulated time, when its lane is free and the ops that it depends on have ended.
Alone it takes the seconds of the resource that it needs longest; ops that together need more of a
resource than there is are slowed alike, and copies take turns, as cost/resources.py says. Each op
is held until its emulated end. When Python is late, the next ops are held for less time, until the
emulation has caught up; they take only what other ops left meanwhile (spare.py).

Use `LLM(model, device="cpu", **emulated(HardwareSpec(...)))`. Stages import `EmulatedRun` by its
name, Ray actors too, so run it from the folder that holds `benchmarks`.
Knows amounts, rates and clocks; not what an op computes.
"""

from __future__ import annotations

import ctypes
import threading
import time
from math import inf
from typing import Any

from benchmarks.spare import Spare
from flexgen_ray.config import HardwareSpec
from flexgen_ray.cost.resources import Amounts, Demand, SharedResources, demand_of
from flexgen_ray.layout.active_ops import ActiveOps
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.runtime.handlers import OpHandlers
from flexgen_ray.runtime.meter import Timing
from flexgen_ray.runtime.modelled import Modelled, RunWrapper
from flexgen_ray.schedule.ops import Op, OpKind

LONGEST_SLEEP = 0.1  # seconds until a cancelled op notices
WAKING = 1e-4  # seconds
_PR_SET_TIMERSLACK = 29
_is_precise = threading.local()


def emulated(
    hardware: HardwareSpec, time_scale: float = 1.0, stands_for: StagePlan | None = None
) -> dict[str, Any]:
    """Arguments of an LLM or a StageSpec whose run emulates this hardware on a CPU.

    time_scale: wall seconds that one modelled second takes; above 0. stands_for: plan of the model
    whose ops are timed, if it isn't the one that runs: like that one but for the model's size and
    where weights lie, which must be the device.
    """
    is_number = isinstance(time_scale, int | float) and not isinstance(time_scale, bool)
    if not is_number or not 0 < time_scale < inf:
        raise ValueError(f"time_scale is {time_scale!r}; it must be a number above 0")
    options = {"time_scale": time_scale, "stands_for": stands_for}
    return {
        "hardware": hardware,
        "run_wrapper": RunWrapper("benchmarks.emulation:EmulatedRun", options),
    }


class EmulatedRun(Modelled):
    """Op handlers that take, in wall time, the modelled seconds times `time_scale`."""

    is_emulated = True

    def __init__(
        self,
        handlers: OpHandlers,
        plan: StagePlan,
        hardware: HardwareSpec,
        time_scale: float = 1.0,
        stands_for: StagePlan | None = None,
    ) -> None:
        """See `emulated`; ValueError on a GPU, whose ops run after they were launched."""
        if handlers.device.type != "cpu":
            raise ValueError("hardware is emulated with CPU ops; give device='cpu'")
        # The ops that the large model would dispatch take their turn, and time, here too ...
        super().__init__(handlers, stands_for or plan, hardware)
        # ... though some have nothing to do for the small one.
        self._has_work = ActiveOps(plan, in_ring=handlers.passes.channel is not None)
        self._pacer = Pacer(hardware, time_scale)

    def run(self, op: Op, ready_at: float) -> Timing:
        """Run the op and return at its emulated end; returns its start and end in emulated time.

        A received message is handled when it has arrived; a message is sent at the end of its op,
        so that it has crossed the emulated network when the neighbour gets it.
        """
        amounts = self._add(op)
        if op.kind in _ARRIVALS:
            self._act(op, ready_at)
            ready_at = time.perf_counter()
        job = self._pacer.begin(amounts, ready_at)
        if op.kind not in _ARRIVALS and op.kind is not OpKind.SEND:
            self._act(op, ready_at)
        self._pacer.end(job)
        if op.kind is OpKind.SEND:
            self._act(op, ready_at)
        return Timing(job.started, job.ended, job.seconds)

    def cancel(self) -> None:
        """Hold no op back any longer."""
        self._pacer.cancel()

    def _act(self, op: Op, ready_at: float) -> None:
        if op.kind not in _OF_GROUPS and not op.group and self._has_work(op):
            self.handlers.run(op, ready_at)


# The large model's experts may be in groups; the small one has them all on the device, in one.
_OF_GROUPS = frozenset({OpKind.READ_EXPERTS, OpKind.LOAD_EXPERTS})
_ARRIVALS = frozenset({OpKind.RECV_TOKENS, OpKind.RECV_ROWS, OpKind.RECV})


class Pacer:
    """Clock of the emulation: plays the simulation's `SharedResources` as wall time passes.

    Whichever thread looks at the clock first plays all that has happened until then: ends of ops,
    and pieces of copies after which others have their turn. time_scale: wall seconds that one
    modelled second takes.
    """

    def __init__(self, hardware: HardwareSpec, time_scale: float) -> None:
        self._hardware = hardware
        self._time_scale = time_scale
        self._origin = time.perf_counter()
        self._played = 0.0  # modelled seconds
        self._changed = threading.Condition()
        self._resources: SharedResources[PacedOp] = SharedResources()
        self._spare = Spare()
        self._spare.note(0.0, self._resources.load)
        self._is_cancelled = False

    def begin(self, amounts: Amounts, ready_at: float) -> PacedOp:
        """Start an op of these amounts at `ready_at` (perf_counter), or now if that is 0."""
        job = PacedOp(demand_of(amounts, self._hardware))
        with self._changed:
            self._play()
            ready = min(self._modelled(ready_at), self._played) if ready_at else self._played
            job.started = self._wall(ready)
            job.seconds = job.demand.seconds * self._time_scale
            left, job.ends = job.demand.seconds, ready
            if ready < self._played:
                link = job.demand.engine
                shares = job.demand.shares | ({} if link is None else {link: 1.0})
                left, job.ends = self._spare.use(shares, left, ready, self._played)
            job.has_ended = left <= 0
            if not job.has_ended:
                self._resources.begin(job, self._played, left)
                self._spare.note(self._played, self._resources.load)
        return job

    def end(self, job: PacedOp) -> None:
        """Wait until the op has had its seconds; job.ended is then its emulated end."""
        _sleep_precisely()
        while True:
            with self._changed:
                self._play()
                if job.has_ended or self._is_cancelled:
                    job.ended = self._wall(job.ends if job.has_ended else self._played)
                    return
                # A copy that waits for its turn still needs the time that it takes alone.
                left = job.left if job.ends == inf else job.ends - self._played
                left *= self._time_scale
                if self._resources.is_contended:
                    # The end of another op may bring this one's end nearer.
                    self._changed.wait(left)
                    continue
            # A thread wakes a little late, so the last WAKING seconds are spent in this loop.
            time.sleep(min(max(left - WAKING, 0.0), LONGEST_SLEEP))

    def cancel(self) -> None:
        """Hold no op back any longer."""
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()

    def _play(self) -> None:
        """Let modelled time pass until now."""
        now, resources, any_ended = self._modelled(time.perf_counter()), self._resources, False
        while (event := resources.next_event()) <= now:
            self._played = max(self._played, event)
            for job in resources.pop_ended(self._played):
                job.has_ended = any_ended = True
            self._spare.note(self._played, resources.load)
        self._played = max(self._played, now)
        if any_ended:
            self._changed.notify_all()

    def _modelled(self, wall: float) -> float:
        return (wall - self._origin) / self._time_scale

    def _wall(self, modelled: float) -> float:
        return self._origin + modelled * self._time_scale


class PacedOp:
    """An op under way, a `RunningOp` in modelled seconds since the run began.

    seconds, started, ended: wall seconds of the op alone, and its emulated times (perf_counter).
    """

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self.speed = 1.0
        self.ends = self.left = self.seconds = self.started = self.ended = 0.0
        self.has_ended = False


def _sleep_precisely() -> None:
    """Ask Linux to wake this thread within 1 ns instead of 50 us after its time (prctl(2))."""
    if not getattr(_is_precise, "done", False):
        _is_precise.done = True
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(_PR_SET_TIMERSLACK, 1)
