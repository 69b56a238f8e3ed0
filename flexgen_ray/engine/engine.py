"""Plans, loads and runs a model's requests in a backend: Ray actors, or this process.

From `LLM(...)` to the first token:

1. `LLM.__init__` (llm.py) checks its options, finds the model's folder, reads its config, and hands
   both to `Engine.__init__` as Settings. No weights are read yet.
2. `Engine.__init__` starts the backend: stages in this process, or Ray with one actor a stage. Each
   stage is probed: its device, free memory, free disk and, where they are known, its rates. From
   this follow each stage's budgets and the dtype.
3. `LLM.generate` checks prompts and turns them into requests, then calls `prepare`.
4. `prepare` sums the requests up as a Workload. If the loaded weights serve it, that is all. Else a
   policy is chosen (planner/choose.py): the user's own, a planned one if the rates are known, or
   one that fills the tiers from the fastest down. Each stage's plan is checked against its budget.
5. `_load` sends every stage its StageSpec; the stage allocates its stores and loads its weights.
6. `stream` gives the requests to the backend and runs it. The first stage's scheduler composes
   passes, and every stage runs its ops (runtime/stage.py). The backend yields an event for each
   pass and each finished request; `stream` turns these into the report, progress and outputs.

Knows requests and settings that were checked; not prompts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from flexgen_ray.config import Deployment, Policy, Workload
from flexgen_ray.engine.backend import Backend, spans, start_backend
from flexgen_ray.engine.sharing import JobSharing
from flexgen_ray.hardware.known import GIVEN
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.admission import mean_cached
from flexgen_ray.layout.pages import CacheSpace
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.budgets import library_note, settle_budgets, settle_dtype
from flexgen_ray.planner.choose import (
    PlanningProblem,
    PolicyChoice,
    RequestName,
    choose_policy,
    numbered_request,
)
from flexgen_ray.planner.other_machines import HardwareFileBackend
from flexgen_ray.planner.stage_policies import StagePolicies
from flexgen_ray.processor import Samples
from flexgen_ray.reporting.report import Report, StageReport
from flexgen_ray.reporting.tally import ProgressTracker, RequestTimes
from flexgen_ray.reporting.trace import write_trace
from flexgen_ray.request import Finished, Request, RequestOutput
from flexgen_ray.runtime.events import OnProgress, Progress, ignore_progress
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.runtime.worker import Machine
from flexgen_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings:
    """Options of an LLM once they are checked.

    weights: folder or hub name of the model, found on each stage's node; None for random weights.
    base: policy with the lossy options that every chosen policy takes over.
    policies: the user's policies; None lets the planner choose.
    dtype: dtype of the computation, or "auto".
    limits: {tier: bytes that may be used}; None for what is free.
    offload_dir: folder for what lies on disk, on each stage's node.
    deployment: number of stages, and where they run.
    seed: seed of the run's random draws.
    execution: fields of StageSpec that don't depend on the plan, such as the executor.
    measures: measure this machine's rates before the weights are loaded.
    max_model_len: tokens of the longest request to plan for; None plans for the requests' own.
    hardware: hardware whose rates are planned with, and in a dry run its memory too.
    max_seconds: longest time that a block may take.
    is_dry: plan, but load and run nothing.
    shares_prefixes: compute what prompts share once.
    """

    weights: str | None
    base: Policy
    policies: StagePolicies | None
    dtype: str
    limits: dict[str, int | None]
    offload_dir: Path
    deployment: Deployment
    seed: int
    execution: dict[str, Any]
    measures: bool
    max_model_len: int | None = None
    hardware: Hardware | None = None
    max_seconds: float | None = None
    is_dry: bool = False
    shares_prefixes: bool = True


class Engine:
    """A model in a backend, which runs requests, one stream at a time.

    machines, budgets: each stage's machine, and the bytes that it may use there. report: figures of
    the last load and the last stream.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        settings: Settings,
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.settings = settings
        self.on_progress = on_progress
        self._plans: list[StagePlan] | None = None
        self._found = JobSharing([])
        self._can_share = True  # False if prefixes have no room beside what is loaded
        self._is_closed = False
        self._run: Generator[Finished | Progress] | None = None
        self.report = Report()
        self.backend, reserved = _start_backend(settings, on_progress)
        try:
            folder = str(settings.offload_dir)
            probed = self.backend.probe(settings.deployment.device, folder)
            self.machines = [_with_rates(it, settings.hardware) for it in probed]
            uses_nccl = self._uses_nccl
            self.budgets = settle_budgets(self.machines, settings.limits, reserved, uses_nccl)
            self.dtype, note = settle_dtype(
                settings.dtype, config.dtype, self.machines, config.overflows_float16
            )
            for each in (note, library_note(self.machines, settings.limits["gpu"], uses_nccl)):
                if each is not None:
                    on_progress(Progress(note=each))
        except BaseException:
            self.close()
            raise

    def prepare(self, requests: list[Request], name: RequestName = numbered_request) -> None:
        """Choose a policy for these requests, check the budgets, and load the weights.

        Does nothing if the weights that are loaded serve these requests too.
        name: returns a request's name for notes and errors, from its index.
        Raises ValueError, with the numbers, for what doesn't fit.
        """
        self.check_usable()
        if not requests:
            return
        self.tokenizer.check()
        job = self._sharing_of(requests)
        if self._plans is not None and self._plans[0].workload.covers(self._workload(job)):
            self._note(self._found.note_lack(self._plans) if self._can_share else None)
            return
        self.on_progress(Progress(phase="planning"))
        choice = self._choose(requests, job, name)
        for note in choice.notes:
            self._note(note)
        if self._plans is not None and list(map(_shape, choice.stages)) == list(
            map(_shape, self._plans)
        ):
            self._plans = choice.stages
            return
        self._plans = None
        started = time.perf_counter()
        if not self.settings.is_dry:
            self._load(choice)
        self._plans = choice.stages
        self.report = Report(time.perf_counter() - started, choice.forecast)

    def _note(self, note: str | None) -> None:
        if note is not None:
            self.on_progress(Progress(note=note))

    def _sharing_of(self, requests: list[Request]) -> JobSharing:
        """Find what the requests share; nothing if the weights that are loaded allow no sharing.

        With max_model_len weights are loaded once, for all calls.
        """
        job = self._find_sharing(requests)
        if self._plans is not None and self._plans[0].workload.sharing is None:
            is_final = not self._can_share or self.settings.max_model_len is not None
            return job.whole() if is_final else job
        return job

    def _find_sharing(self, requests: list[Request]) -> JobSharing:
        """Find what the requests share, once for `prepare` and `stream`."""
        if not self._found.is_of(requests):
            self._found = JobSharing.of(requests, self.settings.shares_prefixes)
        return self._found

    def _choose(self, requests: list[Request], job: JobSharing, name: RequestName) -> PolicyChoice:
        """Choose policies; where prompts share but can't, plan for whole ones, with a note."""
        choice = choose_policy(self._problem(requests, job, name), self.settings.policies)
        self._can_share = job.amount is None or choice.stages[0].workload.sharing is not None
        if self._can_share:
            return choice
        return replace(choice, notes=(*choice.notes, job.note_no_room(choice.stages)))

    def _problem(
        self, requests: list[Request], job: JobSharing, name: RequestName
    ) -> PlanningProblem:
        """Everything that the choice of a policy for these requests depends on."""
        settings = self.settings
        return PlanningProblem(
            self.config,
            self.dtype,
            self._workload(job),
            self.machines,
            self.budgets,
            requests,
            settings.base,
            settings.max_seconds,
            self._stages_disk,
            hops_on_device=self._uses_nccl,
            shared=job.shared,
            # With max_model_len, the requests' lengths don't decide how much memory one takes.
            request_name=name if settings.max_model_len is None else None,
        )

    def _workload(self, job: JobSharing) -> Workload:
        """Sizes that the stores need for a job; with max_model_len, for any within it."""
        longest = self.settings.max_model_len
        return Workload(
            # Only a policy that is chosen depends on the number of requests.
            num_requests=1 if self.settings.policies else len(job.answers),
            max_prompt_len=longest or max(len(it.prompt_token_ids) for it in job.answers),
            # The last token of a text that is scored needs no place in the context.
            max_seq_len=longest + 1 if longest else max(it.max_seq_len for it in job.answers),
            resumes=self.backend.resumes,
            mean_seq_len=mean_cached(job.shared.own_lengths(job.answers)),
            sharing=job.amount,
        )

    @property
    def sharing_line(self) -> str | None:
        """One line for people on what the prompts of the last `prepare` share; None for nothing."""
        return self._found.line(self.plans)

    @property
    def plans(self) -> list[StagePlan]:
        """Each stage's plan, from the last `prepare`."""
        assert self._plans is not None, "prepare comes first"
        return self._plans

    @property
    def _uses_nccl(self) -> bool:
        """True if hidden states go from GPU to GPU."""
        return self.machines[0].on_cuda and self.backend.uses_nccl

    @property
    def _stages_disk(self) -> bool:
        """True if bytes from disk pass through host memory on their way to the device."""
        # A wrapped run is laid out as on a GPU, which the emulation stands for.
        return self.machines[0].on_cuda or self.settings.execution["run_wrapper"] is not None

    def _load(self, chosen: PolicyChoice) -> None:
        """Load every stage, with its plan and the rates of which its ops' times are modelled."""
        settings = self.settings
        spaces = tuple(plan.space for plan in chosen.stages)
        specs = [
            StageSpec(
                settings.weights,
                plan,
                budget,
                machine.device,
                str(settings.offload_dir),
                settings.seed,
                spaces=spaces,
                number=number,
                **settings.execution,
            )
            for number, (plan, budget, machine) in enumerate(
                zip(chosen.stages, self.budgets, self.machines, strict=True)
            )
        ]
        if settings.measures:
            self.on_progress(Progress(phase="measuring this machine's rates"))
            rates = self.backend.rates(specs[0])
            specs = [replace(spec, hardware=rates) for spec in specs]
        elif chosen.rates and settings.execution["hardware"] is None:
            pairs = zip(specs, chosen.rates, strict=True)
            specs = [replace(spec, hardware=rates) for spec, rates in pairs]
        self.backend.load(specs, self.on_progress)

    def stream(
        self, requests: list[Request], on_progress: OnProgress | None = None
    ) -> Iterator[RequestOutput]:
        """Run the requests; yields outputs as they finish, and then completes `report`.

        on_progress: takes this run's progress in place of the LLM's own on_progress.
        One stream at a time. A stream that isn't read to its end drops the loaded weights, and the
        next `prepare` loads them again.
        """
        self.check_usable()
        self.report = Report(self.report.load_seconds, self.report.forecast)
        if not requests:
            return
        if self.settings.is_dry:
            raise RuntimeError("this LLM only plans (dry_run=True); make one that runs")
        assert self._plans is not None, "prepare comes first"
        samples = Samples(requests)
        job, forecast = self._find_sharing(requests), self.report.forecast
        self.report.prompt_tokens = job.prompt_tokens
        self.report.possible_tokens = job.shared.possible_tokens
        tally = ProgressTracker(samples.requests, forecast, job.saved_tokens(self._plans))
        times = RequestTimes(samples.requests)
        self.backend.add(samples.requests)
        self._run = cast(Generator[Finished | Progress], self.backend.run())
        try:
            listeners = self.report.add, times.note, on_progress or self.on_progress
            for output in self._outputs(tally.follow(self._run, *listeners), samples):
                yield times.finish(output)
            self.report.recoveries = self.backend.recoveries
            stages = self._plans, self.budgets, self.machines
            used, measured = self.backend.used(), self.backend.measured()
            self.report.stages = list(map(StageReport, *stages, used, measured))
        except BaseException:
            if self._run is not None:
                self._stop_run()
                self.backend.abort()
            raise
        finally:
            self._run = None

    def write_trace(self, path: str | Path) -> None:
        """Write the last run's ops as a Chrome trace.

        Raises ValueError if the LLM was made without trace=True.
        """
        self.check_usable()
        if not self.settings.execution["keeps_spans"]:
            raise ValueError("no trace was kept; make the LLM with trace=True")
        stages = [spans(self.backend, stage) for stage in range(len(self.report.stages))]
        is_emulated = any(stage.measured.is_emulated for stage in self.report.stages)
        write_trace(Path(path), stages, is_emulated)

    def close(self) -> None:
        """Stop a stream that runs, and free the backend's memory, files and processes."""
        self._is_closed = True
        self._stop_run()
        self.tokenizer.close()
        self.backend.close()

    def _outputs(self, run: Iterator[Finished], samples: Samples) -> Iterator[RequestOutput]:
        """Output of each request of which all samples have finished."""
        for finished in run:
            output = samples.take(finished, self.tokenizer)
            if output is not None:
                self.report.num_requests += 1
                self.report.cut.update(samples.cut(output))
                yield output
        if samples.num_unanswered:
            raise RuntimeError(
                f"the LLM was closed with {samples.num_unanswered} requests unanswered"
            )

    def check_usable(self) -> None:
        """Raise RuntimeError if this LLM is closed, or if a stream runs already."""
        if self._is_closed:
            raise RuntimeError("this LLM is closed; make another one")
        if self._run is not None:
            raise RuntimeError("this LLM is generating; finish or close its stream first")

    def _stop_run(self) -> None:
        """End the stream that runs, if any; returns when every lane of the stages has stopped."""
        if self._run is not None:
            self._run.close()
            self._run = None
            self._plans = None


def _shape(plan: StagePlan) -> tuple[StagePlan, CacheSpace]:
    """The plan without what the loaded stage doesn't depend on: number and means of requests."""
    workload = replace(plan.workload, num_requests=1, mean_seq_len=None, sharing=None)
    return replace(plan, workload=workload), plan.space


def _start_backend(settings: Settings, on_progress: OnProgress) -> tuple[Backend, int]:
    """Start the backend as start_backend does; a dry run starts as little as it can.

    It needs no backend to plan for a hardware file, and no Ray to plan for this machine alone.
    """
    deployment = settings.deployment
    if not settings.is_dry:
        return start_backend(deployment, on_progress)
    if settings.hardware is not None:
        return HardwareFileBackend(settings.hardware, deployment), 0
    is_on_cluster = bool(deployment.address or os.environ.get("RAY_ADDRESS"))
    use_ray = deployment.use_ray and (deployment.num_stages != 1 or is_on_cluster)
    return start_backend(replace(deployment, use_ray=use_ray), on_progress)


def _with_rates(machine: Machine, hardware: Hardware | None) -> Machine:
    """The machine with these rates instead of its own; unchanged if `hardware` is None.

    Raises ValueError if one of them has a GPU and the other has none.
    """
    if hardware is None:
        return machine
    if hardware.device.is_cpu == machine.on_cuda:
        raise ValueError(
            f"hardware {hardware.name} has {'no' if hardware.device.is_cpu else 'a'} GPU, unlike "
            f"{machine.host}, which runs on {machine.device}; --dry-run plans for it alone"
        )
    return replace(machine, hardware=hardware, rates_source=GIVEN)
