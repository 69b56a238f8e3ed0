"""Plans, loads and runs a model's requests in a backend: Ray actors, or this process.

Knows requests and settings that were checked; not prompts, nor how they became requests.
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
from flexgen_ray.hardware.known import GIVEN
from flexgen_ray.hardware.spec import Hardware
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.models.config import ModelConfig
from flexgen_ray.planner.budgets import settle_budgets, settle_dtype
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

    weights: a folder or hub name, looked up on each stage's node; None makes weights up. base: what
    a policy that is chosen takes over, its lossy options. limits: bytes of each tier, None for what
    is free. execution: fields of StageSpec that say how to run. measures: measure this machine's
    rates before the weights are loaded. max_model_len: plan for requests of so many tokens, however
    short they are. hardware: has the rates to plan by, and in a dry run the memory too.
    max_seconds: that a block may take. is_dry: plan, but load and run nothing.
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


class Engine:
    """A backend with its machines, budgets and dtype, which runs requests one stream at a time."""

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
        self._is_closed = False
        self._run: Generator[Finished | Progress] | None = None
        self.report = Report()
        self.backend, reserved = _start_backend(settings, on_progress)
        try:
            folder = str(settings.offload_dir)
            probed = self.backend.probe(settings.deployment.device, folder)
            self.machines = [_with_rates(it, settings.hardware) for it in probed]
            self.budgets = settle_budgets(self.machines, settings.limits, reserved)
            self.dtype, note = settle_dtype(
                settings.dtype, config.dtype, self.machines, config.overflows_float16
            )
            if note is not None:
                on_progress(Progress(note=note))
        except BaseException:
            self.close()
            raise

    def prepare(self, requests: list[Request], name: RequestName = numbered_request) -> None:
        """Settle the policy, check the budget, and load the weights unless what is loaded serves.

        name: a request's name for people, from its index, for what is said of single ones. Raises
        ValueError, with the numbers, for what doesn't fit.
        """
        self.check_usable()
        if not requests:
            return
        self.tokenizer.check()
        settings, workload = self.settings, self._workload(requests)
        if self._plans is not None and self._plans[0].workload.covers(workload):
            return
        self.on_progress(Progress(phase="planning"))
        problem = PlanningProblem(
            self.config,
            self.dtype,
            workload,
            self.machines,
            self.budgets,
            requests,
            settings.base,
            settings.max_seconds,
            self._stages_disk,
            hops_on_device=self.machines[0].on_cuda and self.backend.uses_nccl,
            # With max_model_len, the requests' lengths don't decide how much memory one takes.
            request_name=name if settings.max_model_len is None else None,
        )
        choice = choose_policy(problem, settings.policies)
        for note in choice.notes:
            self.on_progress(Progress(note=note))
        if self._plans is not None and list(map(_shape, choice.stages)) == list(
            map(_shape, self._plans)
        ):
            self._plans = choice.stages
            return
        self._plans = None
        started = time.perf_counter()
        if not settings.is_dry:
            self._load(choice)
        self._plans = choice.stages
        self.report = Report(time.perf_counter() - started, choice.planned)

    def _workload(self, requests: list[Request]) -> Workload:
        """Demands of these requests on the stores; with max_model_len, of any request within it."""
        longest = self.settings.max_model_len
        prompts = (len(request.prompt_token_ids) for request in requests)
        return Workload(
            # How many there are matters to the default policy alone.
            num_requests=1 if self.settings.policies else sum(it.params.n for it in requests),
            max_prompt_len=longest or max(prompts),
            # The last token of a text that is scored needs no place in the context.
            max_seq_len=longest + 1 if longest else max(it.max_seq_len for it in requests),
            resumes=self.backend.resumes,
        )

    @property
    def plans(self) -> list[StagePlan]:
        """Each stage's plan, as `prepare` settled it."""
        assert self._plans is not None, "prepare comes first"
        return self._plans

    @property
    def _stages_disk(self) -> bool:
        """True if what is read from disk passes through host memory on its way to the device."""
        # A wrapped run is laid out as on a GPU, which the emulation stands for.
        return self.machines[0].on_cuda or self.settings.execution["run_wrapper"] is not None

    def _load(self, chosen: PolicyChoice) -> None:
        """Bring every stage up with its plan, and with the rates that its ops are modelled by."""
        settings = self.settings
        specs = [
            StageSpec(
                settings.weights,
                plan,
                budget,
                machine.device,
                str(settings.offload_dir),
                settings.seed,
                **settings.execution,
            )
            for plan, budget, machine in zip(
                chosen.stages, self.budgets, self.machines, strict=True
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
        """Outputs as they finish; `report` then tells how it went.

        One stream at a time. Left before its end it takes the loaded weights with it: the next
        `prepare` loads them again.
        """
        self.check_usable()
        self.report = Report(self.report.load_seconds, self.report.planned)
        if not requests:
            return
        if self.settings.is_dry:
            raise RuntimeError("this LLM only plans (dry_run=True); make one that runs")
        assert self._plans is not None, "prepare comes first"
        samples = Samples(requests)
        tally = ProgressTracker(samples.requests, self.report.planned)
        times = RequestTimes(samples.requests)
        self.backend.add(samples.requests)
        self._run = cast(Generator[Finished | Progress], self.backend.run())
        try:
            listeners = self.report.add, times.note, on_progress or self.on_progress
            for output in self._outputs(tally.follow(self._run, *listeners), samples):
                yield times.finish(output)
            self.report.recoveries = self.backend.recoveries
            found = self._plans, self.budgets, self.machines
            used, measured = self.backend.used(), self.backend.measured()
            self.report.stages = list(map(StageReport, *found, used, measured))
        except BaseException:
            if self._run is not None:
                self._stop_run()
                self.backend.abort()
            raise
        finally:
            self._run = None

    def write_trace(self, path: str | Path) -> None:
        """The last run's ops as a Chrome trace, if the LLM was made with trace=True."""
        self.check_usable()
        if not self.settings.execution["keeps_spans"]:
            raise ValueError("no trace was kept; make the LLM with trace=True")
        stages = [spans(self.backend, stage) for stage in range(len(self.report.stages))]
        is_emulated = any(stage.measured.is_emulated for stage in self.report.stages)
        write_trace(Path(path), stages, is_emulated)

    def close(self) -> None:
        """Stops the worker, in the middle of a stream too; memory and files are given back."""
        self._is_closed = True
        self._stop_run()
        self.tokenizer.close()
        self.backend.close()

    def _outputs(self, run: Iterator[Finished], samples: Samples) -> Iterator[RequestOutput]:
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
        """RuntimeError if it is closed, or generates already."""
        if self._is_closed:
            raise RuntimeError("this LLM is closed; make another one")
        if self._run is not None:
            raise RuntimeError("this LLM is generating; finish or close its stream first")

    def _stop_run(self) -> None:
        """Every lane of the stage has stopped when this returns."""
        if self._run is not None:
            self._run.close()
            self._run = None
            self._plans = None


def _shape(plan: StagePlan) -> StagePlan:
    """The plan for any number of requests: a stage of this plan serves them all."""
    return replace(plan, workload=replace(plan.workload, num_requests=1))


def _start_backend(settings: Settings, on_progress: OnProgress) -> tuple[Backend, int]:
    """As start_backend; a dry run needs no actor but to see a cluster's machines."""
    wanted = settings.deployment
    if not settings.is_dry:
        return start_backend(wanted, on_progress)
    if settings.hardware is not None:
        return HardwareFileBackend(settings.hardware, wanted), 0
    is_here = wanted.num_stages == 1 and not (wanted.address or os.environ.get("RAY_ADDRESS"))
    return start_backend(replace(wanted, use_ray=wanted.use_ray and not is_here), on_progress)


def _with_rates(machine: Machine, hardware: Hardware | None) -> Machine:
    """With these rates instead of its own; ValueError if they are of another kind of device."""
    if hardware is None:
        return machine
    if hardware.device.is_cpu == machine.on_cuda:
        raise ValueError(
            f"hardware {hardware.name} has {'no' if hardware.device.is_cpu else 'a'} GPU, unlike "
            f"{machine.host}, which runs on {machine.device}; --dry-run plans for it alone"
        )
    return replace(machine, hardware=hardware, rates_source=GIVEN)
