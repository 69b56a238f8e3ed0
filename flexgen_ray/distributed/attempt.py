"""One run of all stages, until its end or until a stage is lost; and calls to stages' actors.

Knows the signs of a fault as the driver sees them: a process that died, an error that a stage
raised, a run that stands still, and neighbours that only suffer from the fault of another stage.
Names the stages at fault (StageLost); replaces none.
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

POLL_SECONDS = 2  # between two questions about the progress of loading
SETTLE_SECONDS = 5  # for stages to notice that another stage has gone
HEARTBEAT_SECONDS = 5  # for a stage to answer with its heartbeat
CHECKS_PER_STALL = 20  # times that heartbeats are compared before a stall ends a run


class StageLost(RuntimeError):
    """Stages that can't go on.

    reasons: {stage: the error that ended it}. nodes: {stage: the name of its node}, where the text
    should name nodes. Tracebacks of errors that stages raised are notes of this exception.
    """

    def __init__(
        self, reasons: dict[int, Exception], nodes: Mapping[int, str] | None = None
    ) -> None:
        self.reasons = reasons
        where = {stage: f" on {name}" for stage, name in (nodes or {}).items()}
        parts = (
            f"stage {stage}{where.get(stage, '')} {_describe(error)}"
            for stage, error in reasons.items()
        )
        super().__init__("; ".join(parts))
        for stage, error in reasons.items():
            if isinstance(error, RayTaskError):
                self.add_note(traceback_note(error, stage, where.get(stage, "")))


class Stalled(RuntimeError):
    """A stage that doesn't answer, or that makes no progress."""


class Attempt:
    """One run of every stage, as an iterator of the events that the first stage reports.

    Constructing it starts the run on all actors; the first one has its requests already. Iterating
    watches three things:

    1. The first stage's reports, which are yielded.
    2. The other stages' calls, which end with the run. One that raises is a fault (`_raise_lost`).
    3. Heartbeats, when neither of these comes for a while. A stage's heartbeat counts the ops that
       it has finished. If no stage has finished any for `stall_seconds`, the run stands still, and
       the stages with an op under way are at fault; those without one only wait for them.

    Raises StageLost with the stages at fault.
    """

    def __init__(self, actors: Sequence[Any], stall_seconds: float) -> None:
        self._actors = actors
        self._stall_seconds = stall_seconds
        self._reports: Any = actors[0].run_first.options(num_returns="streaming").remote()
        self._ends = [
            self._reports.completed(),
            *(actor.run_later.remote() for actor in actors[1:]),
        ]
        self._heartbeats: list[Heartbeat] = []
        self._last_progress = time.monotonic()

    def __iter__(self) -> Iterator[Finished | Progress]:
        running = self._ends[1:]
        seconds = self._stall_seconds / CHECKS_PER_STALL
        while True:
            ready: list[Any] = ray.wait([self._reports, *running], timeout=seconds)[0]
            if not ready:
                self._check_heartbeats()
            elif ready[0] is self._reports:
                try:
                    events = ray.get(next(self._reports))
                except StopIteration:
                    break
                except Exception:
                    self._raise_lost()
                self._last_progress = time.monotonic()
                yield from events
            else:
                try:
                    ray.get(ready[0])
                except Exception:
                    self._raise_lost()
                running.remove(ready[0])
        stages = [self._ends.index(end) for end in running]
        await_stages(running, stages, SETTLE_SECONDS)

    def _raise_lost(self) -> None:
        """Raise StageLost after some stage failed, once the others had time to notice it."""
        ray.wait(self._ends, num_returns=len(self._ends), timeout=SETTLE_SECONDS)
        reasons: dict[int, Exception] = {}
        for stage, end in enumerate(self._ends):
            try:
                ray.get(end, timeout=0)
            except GetTimeoutError:
                _discard(end)
                reasons[stage] = Stalled(f"still ran {SETTLE_SECONDS} s after another had stopped")
            except Exception as error:
                reasons[stage] = error
        self._drain()
        raise StageLost(_root_causes(reasons))

    def _drain(self) -> None:
        """Take the first stage's last reports: Ray logs an error that is never taken."""
        while ray.wait([self._reports], timeout=0)[0]:
            try:
                ray.get(next(self._reports))
            except (StopIteration, Exception):
                return

    def _check_heartbeats(self) -> None:
        """Raise StageLost if no stage has finished an op for `stall_seconds`."""
        try:
            heartbeats = self._ask_heartbeats()
        except StageLost:
            # A stage may only be too busy to answer: silence once proves nothing.
            heartbeats = self._heartbeats
        if [it.num_ops for it in heartbeats] != [it.num_ops for it in self._heartbeats]:
            self._last_progress = time.monotonic()
        self._heartbeats = heartbeats
        idle = time.monotonic() - self._last_progress
        if idle < self._stall_seconds:
            return
        heartbeats = self._ask_heartbeats()  # this time a stage that doesn't answer is lost
        stuck: dict[int, Exception] = {
            stage: Stalled(f"has stood still for {idle:.0f} s, in {heartbeat.op}")
            for stage, heartbeat in enumerate(heartbeats)
            if heartbeat.op
        }
        waiting: Exception = Stalled(f"has stood still for {idle:.0f} s, as have all")
        raise StageLost(stuck or dict.fromkeys(range(len(heartbeats)), waiting))

    def _ask_heartbeats(self) -> list[Heartbeat]:
        """Every stage's heartbeat; StageLost for stages that don't answer in time."""
        answers = [actor.heartbeat.remote() for actor in self._actors]
        return await_stages(answers, range(len(answers)), HEARTBEAT_SECONDS)


def load_stages(
    actors: Sequence[Any],
    specs: Sequence[StageSpec],
    nodes: Mapping[int, str],
    on_progress: OnProgress,
) -> None:
    """Load every stage's weights at the same time, and show their progress as one.

    nodes: {stage: the name of its node} (see get_results). Raises the error that a stage raised, or
    RuntimeError if its process died.
    """
    on_progress(Progress(phase=LOADING))
    loading = [actor.load.remote(spec) for actor, spec in zip(actors, specs, strict=True)]
    while ray.wait(loading, num_returns=len(loading), timeout=POLL_SECONDS)[1]:
        on_progress(_total_progress([actor.loading.remote() for actor in actors]))
    get_results(loading, nodes)


def _total_progress(answers: list) -> Progress:
    """Sum of the progress of the stages that answer in time."""
    ready = ray.wait(answers, num_returns=len(answers), timeout=POLL_SECONDS)[0]
    try:
        shares: list[Progress] = ray.get(ready)
    except RayError:  # the call that loads raises the cause
        shares = []
    phase = shares[0].phase if shares else LOADING
    done, total = sum(it.done for it in shares), sum(it.total for it in shares)
    return Progress(phase=phase, done=done, total=total, unit="bytes")


def await_stages(
    references: Sequence[Any], stages: Sequence[int], timeout: float | None = None
) -> list:
    """Answers of these stages, one a reference.

    timeout: seconds for all of them together; None waits without limit.
    Raises StageLost with every stage that raised an error or didn't answer in time.
    """
    answers: list = []
    reasons: dict[int, Exception] = {}
    deadline = None if timeout is None else time.monotonic() + timeout
    for stage, reference in zip(stages, references, strict=True):
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        try:
            answers.append(ray.get(reference, timeout=left))
        except GetTimeoutError:
            _discard(reference)
            reasons[stage] = Stalled(f"did not answer within {timeout:g} s")
        except Exception as error:
            reasons[stage] = error
    if reasons:
        raise StageLost(_root_causes(reasons))
    return answers


def get_results(
    references: Sequence[Any], nodes: Mapping[int, str] | None = None, first: int = 0
) -> list:
    """Results of consecutive stages, of which `first` is the first.

    nodes: {stage: the name of its node}, where an error should name it. Raises the first error that
    a stage raised, of its own type, with the stage's traceback as a note.
    """
    values: list = []
    try:
        for reference in references:
            values.append(ray.get(reference))
        return values
    except RayTaskError as error:
        for reference in references:
            _discard(reference)
        stage = first + len(values)
        raise original_error(error, stage, (nodes or {}).get(stage, "")) from None
    except RayActorError as error:
        raise RuntimeError(
            f"a stage's process died ({error}); if the node ran out of memory, lower --cpu-memory"
        ) from error


def original_error(error: RayTaskError, stage: int, node: str = "") -> Exception:
    """Error that a stage raised, of its own type, with its traceback as a note.

    node: name of the stage's node, to be named in the text; "" leaves the text unchanged.
    """
    cause: Exception = error.cause or error
    named, where = cause, f" on {node}" if node else ""
    if node:
        try:
            named = type(cause)(f"stage {stage}{where}: {cause}")  # type: ignore[call-arg]
        except Exception:  # a type that takes other arguments
            named = RuntimeError(f"stage {stage}{where}: {type(cause).__name__}: {cause}")
    named.add_note(traceback_note(error, stage, where))
    return named


def traceback_note(error: RayTaskError, stage: int, where: str) -> str:
    """Traceback of the stage's own process, as text. where: " on NODE" or ""."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))  # remove Ray's colours
    return f"raised by stage {stage}{where}:\n{text.strip()}"


def _discard(reference: Any) -> None:
    """Take the answer when it comes, and drop it: Ray logs errors that are never taken."""
    reference.future()


def _root_causes(reasons: dict[int, Exception]) -> dict[int, Exception]:
    """Reasons without those of stages that only lost a neighbour, unless no other is left.

    The neighbours of a stage that dies fail too, with ChannelClosed, because their channels to it
    close. They keep their weights, and only the stage that caused it is replaced.
    """
    causes = {
        stage: error for stage, error in reasons.items() if not _has_cause(error, ChannelClosed)
    }
    return causes or reasons


def _has_cause(error: Exception, kind: type[Exception]) -> bool:
    return isinstance(error, kind) or isinstance(getattr(error, "cause", None), kind)


def _describe(error: Exception) -> str:
    """Predicate for "stage 1 ...": the way in which this error ended the stage."""
    if isinstance(error, RayActorError):
        return "lost its process"
    if isinstance(error, RayTaskError) and error.cause is not None:
        return f"failed: {type(error.cause).__name__}: {error.cause}"
    return str(error)
