"""One run of all stages under one epoch, until its end or until a stage is lost.

Knows how a fault looks from outside: a dead process, an error, a run that stands still, and
neighbours that only suffer from one. Doesn't mend anything.

Every stage loads its weights at the same time, and their progress is shown as one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from flexgen_ray.request import Finished
from flexgen_ray.runtime.events import OnProgress, Progress
from flexgen_ray.runtime.lanes import Heartbeat
from flexgen_ray.runtime.ring import ChannelClosed
from flexgen_ray.runtime.stage import LOADING, StageSpec

LOOK_SECONDS = 2  # between two looks at the stages


def load_stages(
    actors: Sequence[Any],
    specs: Sequence[StageSpec],
    nodes: Mapping[int, str],
    on_progress: OnProgress,
) -> None:
    """Raises the error that a stage raised, or RuntimeError if its process died.

    nodes: see attempt.get.
    """
    on_progress(Progress(phase=LOADING))
    loading = [actor.load.remote(spec) for actor, spec in zip(actors, specs, strict=True)]
    while ray.wait(loading, num_returns=len(loading), timeout=LOOK_SECONDS)[1]:
        on_progress(_together([actor.loading.remote() for actor in actors]))
    get_results(loading, nodes)


def _together(looks: list) -> Progress:
    """The sum of the stages that answer in time."""
    ready = ray.wait(looks, num_returns=len(looks), timeout=LOOK_SECONDS)[0]
    try:
        shares: list[Progress] = ray.get(ready)
    except RayError:  # the load itself raises its cause
        shares = []
    phase = shares[0].phase if shares else LOADING
    done, total = sum(it.done for it in shares), sum(it.total for it in shares)
    return Progress(phase=phase, done=done, total=total, unit="bytes")


SETTLE_SECONDS = 5  # that stages get to notice that another has gone
PULSE_SECONDS = 5
TICKS = 20  # looks at the stages within the time that a stall may last


class StageLost(RuntimeError):
    """Stages that can't go on: {stage: the reason}; nodes: {stage: the name of its node}.

    What stages themselves raised, with their tracebacks, are notes of this exception.
    """

    def __init__(
        self, reasons: dict[int, Exception], nodes: Mapping[int, str] | None = None
    ) -> None:
        self.reasons = reasons
        where = {stage: f" on {name}" for stage, name in (nodes or {}).items()}
        told = (f"stage {it}{where.get(it, '')} {_tell(why)}" for it, why in reasons.items())
        super().__init__("; ".join(told))
        for stage, why in reasons.items():
            if isinstance(why, RayTaskError):
                self.add_note(traceback_note(why, stage, where.get(stage, "")))


class Stalled(RuntimeError):
    """A stage that does nothing and waits for nobody."""


def await_stages(
    references: Sequence[Any], stages: Sequence[int], timeout: float | None = None
) -> list:
    """What these stages answer; StageLost blames those that don't."""
    answers: list = []
    reasons: dict[int, Exception] = {}
    deadline = None if timeout is None else time.monotonic() + timeout
    for stage, reference in zip(stages, references, strict=True):
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        try:
            answers.append(ray.get(reference, timeout=left))
        except GetTimeoutError:
            _let_fail(reference)
            reasons[stage] = Stalled(f"did not answer within {timeout:g} s")
        except Exception as error:
            reasons[stage] = error
    if reasons:
        raise StageLost(_culprits(reasons))
    return answers


def get_results(
    references: Sequence[Any], nodes: Mapping[int, str] | None = None, first: int = 0
) -> list:
    """The stages' values, or what a stage raised: of its type, with its place and traceback.

    nodes: {stage: the name of its node}, where the place is worth telling. first: the first stage.
    """
    values: list = []
    try:
        for reference in references:
            values.append(ray.get(reference))
        return values
    except RayTaskError as error:
        for reference in references:
            _let_fail(reference)
        stage = first + len(values)
        raise original_error(error, stage, (nodes or {}).get(stage, "")) from None
    except RayActorError as error:
        raise RuntimeError(
            f"a stage's process died ({error}); if the node ran out of memory, lower --cpu-memory"
        ) from error


class Attempt:
    """The stages' runs; the first has its requests already."""

    def __init__(self, actors: Sequence[Any], stall_seconds: float) -> None:
        self._actors = actors
        self._stall_seconds = stall_seconds
        self._events: Any = actors[0].lead.options(num_returns="streaming").remote()
        self._ends = [self._events.completed(), *(actor.follow.remote() for actor in actors[1:])]
        self._pulses: list[Heartbeat] = []
        self._moved_at = time.monotonic()

    def __iter__(self) -> Iterator[Finished | Progress]:
        """What the first stage tells."""
        followers = self._ends[1:]
        tick = self._stall_seconds / TICKS
        while True:
            ready: list[Any] = ray.wait([self._events, *followers], timeout=tick)[0]
            if not ready:
                self._watch()
            elif ready[0] is self._events:
                try:
                    batch = ray.get(next(self._events))
                except StopIteration:
                    break
                except Exception:
                    self._blame()
                self._moved_at = time.monotonic()
                yield from batch
            else:
                self._blame_if_failed(ready[0])
                followers.remove(ready[0])
        await_stages(
            followers, range(len(self._ends) - len(followers), len(self._ends)), SETTLE_SECONDS
        )

    def _blame_if_failed(self, end: Any) -> None:
        try:
            ray.get(end)
        except Exception:
            self._blame()

    def _blame(self) -> None:
        """Some stage failed; the others get time to notice."""
        ray.wait(self._ends, num_returns=len(self._ends), timeout=SETTLE_SECONDS)
        reasons: dict[int, Exception] = {}
        for stage, end in enumerate(self._ends):
            try:
                ray.get(end, timeout=0)
            except GetTimeoutError:
                _let_fail(end)
                reasons[stage] = Stalled(f"still ran {SETTLE_SECONDS} s after another had stopped")
            except Exception as error:
                reasons[stage] = error
        self._drain()
        raise StageLost(_culprits(reasons))

    def _drain(self) -> None:
        """Take what the first stage said last: an error that is never taken is logged by Ray."""
        while ray.wait([self._events], timeout=0)[0]:
            try:
                ray.get(next(self._events))
            except (StopIteration, Exception):
                return

    def _watch(self) -> None:
        """Nothing was told for a while: have the stages done anything since the last look?"""
        try:
            waiting = [actor.heartbeat.remote() for actor in self._actors]
            pulses = await_stages(waiting, range(len(waiting)), PULSE_SECONDS)
        except StageLost:
            # Busy or stopped: one look is no proof.
            pulses = self._pulses
        if [it.num_ops for it in pulses] != [it.num_ops for it in self._pulses]:
            self._moved_at = time.monotonic()
        self._pulses = pulses
        still = time.monotonic() - self._moved_at
        if still < self._stall_seconds:
            return
        waiting = [actor.heartbeat.remote() for actor in self._actors]
        pulses = await_stages(waiting, range(len(waiting)), PULSE_SECONDS)
        stuck: dict[int, Exception] = {
            stage: Stalled(f"has stood still for {still:.0f} s, in {it.op}")
            for stage, it in enumerate(pulses)
            if it.op
        }
        idle: Exception = Stalled(f"has stood still for {still:.0f} s, as have all")
        raise StageLost(stuck or dict.fromkeys(range(len(pulses)), idle))


def original_error(error: RayTaskError, stage: int, node: str = "") -> Exception:
    """The error that a stage raised, of its own type, with its traceback as a note.

    node: its name, which then is in the text.
    """
    cause: Exception = error.cause or error
    named, where = cause, f" on {node}" if node else ""
    if node:
        try:
            named = type(cause)(f"stage {stage}{where}: {cause}")  # type: ignore[call-arg]
        except Exception:  # one that takes other arguments
            named = RuntimeError(f"stage {stage}{where}: {type(cause).__name__}: {cause}")
    named.add_note(traceback_note(error, stage, where))
    return named


def traceback_note(error: RayTaskError, stage: int, where: str) -> str:
    """The traceback as it was in the stage's own process."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))  # Ray colours it
    return f"raised by stage {stage}{where}:\n{text.strip()}"


def _let_fail(reference: Any) -> None:
    """Take the answer when it comes, for Ray logs errors that are never taken."""
    reference.future()


def _culprits(reasons: dict[int, Exception]) -> dict[int, Exception]:
    """Whoever only lost a neighbour is innocent, unless nobody else is to blame."""
    guilty = {stage: why for stage, why in reasons.items() if not _has_cause(why, ChannelClosed)}
    return guilty or reasons


def _has_cause(error: Exception, kind: type[Exception]) -> bool:
    return isinstance(error, kind) or isinstance(getattr(error, "cause", None), kind)


def _tell(error: Exception) -> str:
    if isinstance(error, RayActorError):
        return "lost its process"
    if isinstance(error, RayTaskError) and error.cause is not None:
        return f"failed: {type(error.cause).__name__}: {error.cause}"
    return str(error)
