"""Stage: a contiguous range of layers with its stores, lanes and executor.

Knows one stage and its channel to the neighbours; no Ray and no text.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch

from flexgen_ray.config import Budget, HardwareSpec
from flexgen_ray.hardware.host import tune_malloc_for_loading, tune_malloc_for_ops
from flexgen_ray.kernels.host_kernel import (
    AttentionShape,
    HostKernel,
    choose_kernel,
    compiled_kernel,
    load_kernel,
    takes_torch_threads,
)
from flexgen_ray.layout.active_ops import ActiveOps
from flexgen_ray.layout.admission import Admission
from flexgen_ray.layout.pages import CacheSpace
from flexgen_ray.layout.plan import StagePlan
from flexgen_ray.layout.sizes import check_budget, host_workspace_bytes, workspace_bytes
from flexgen_ray.models.checkpoint import Checkpoint
from flexgen_ray.models.dummy import DummyWeights
from flexgen_ray.paths import calibration_dir
from flexgen_ray.request import Finished, Request
from flexgen_ray.runtime.events import OnProgress, Progress, ignore_progress
from flexgen_ray.runtime.executor import AsyncExecutor, SerialExecutor
from flexgen_ray.runtime.handlers import LogitsHook, OpHandlers
from flexgen_ray.runtime.lanes import (
    Cores,
    Heartbeat,
    LaneWorker,
    OpWatch,
    Run,
    device_wait,
    divide_cores,
    make_lane_workers,
)
from flexgen_ray.runtime.meter import Meter, StageMeasurements, VisitTiming
from flexgen_ray.runtime.modelled import Modelled, RunWrapper
from flexgen_ray.runtime.next_tokens import FindStop, not_finite_message
from flexgen_ray.runtime.ring import Channel
from flexgen_ray.runtime.scheduler import Scheduler
from flexgen_ray.schedule.dependencies import window_ops
from flexgen_ray.schedule.ops import Span
from flexgen_ray.schedule.zigzag import zigzag
from flexgen_ray.store.tiers import DiskTier, MemoryTier, Tiers
from flexgen_ray.store.weights import WeightSource, WeightStore

EXECUTORS = ("serial", "async")
LOADING = "loading weights"
PACKING = "loading and packing weights"


@dataclass(frozen=True)
class StageSpec:
    """Specification of a stage, from which any process that sees the files can load it.

    model: folder of the checkpoint; None for random weights.
    device: torch's name; offload_dir: folder for what is kept on disk.
    seed: for requests without one; executor: one of EXECUTORS.
    hardware: rates for which the run's modelled seconds are summed, None for none.
    run_wrapper: runs the ops in place of Modelled; needs hardware.
    keeps_spans: record when each op ran.
    spaces: room for cached rows in every stage of the ring; empty for a stage that is the whole
    model. number: of the stage among them.
    """

    model: str | None
    plan: StagePlan
    budget: Budget
    device: str
    offload_dir: str
    seed: int = 0
    executor: str = "async"
    hardware: HardwareSpec | None = None
    run_wrapper: RunWrapper | None = None
    keeps_spans: bool = False
    spaces: tuple[CacheSpace, ...] = ()
    number: int = 0


class Stage:
    """A loaded stage: memory is allocated, weights are loaded.

    run generates, and close frees the offload files.
    """

    def __init__(
        self,
        spec: StageSpec,
        find_stop: FindStop | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        def report(done: int, total: int) -> None:
            on_progress(Progress(phase=phase, done=done, total=total, unit="bytes"))

        is_quantized = spec.plan.policy.weight_bits and not spec.plan.config.weight_bits
        phase = PACKING if is_quantized else LOADING
        check_budget(spec.plan, spec.budget)
        self._model = Modelled if spec.run_wrapper is None else spec.run_wrapper.load()
        if spec.run_wrapper is not None and spec.hardware is None:
            raise ValueError(f"run_wrapper {spec.run_wrapper.path!r} needs hardware=HardwareSpec")
        plan, device = spec.plan, torch.device(spec.device)
        self.spec = spec
        self._cores = cores_for(plan, device)
        # Before the budget's memory is allocated, because the kernels may have to be measured.
        attend = choose_host_kernel(plan, self._cores.host, spec.budget.cpu // 2)
        on_device = choose_device_kernel(plan, device, self._cores.device, spec.budget.gpu // 2)
        self._attends_by_torch = plan.attends_on_host and takes_torch_threads(attend)
        self.tiers = Tiers(
            MemoryTier("gpu", spec.budget.gpu, device),
            MemoryTier("cpu", spec.budget.cpu, torch.device("cpu"), pinned=device.type == "cuda"),
            DiskTier(spec.budget.disk, Path(spec.offload_dir)),
        )
        try:
            self.tiers.gpu.book("workspace", workspace_bytes(plan))
            self.tiers.cpu.book("workspace", host_workspace_bytes(plan))
            tune_malloc_for_loading()
            weights = WeightStore(plan, _weight_source(spec), self.tiers, report)
            tune_malloc_for_ops()
            self.scheduler = Scheduler(
                plan.policy.gpu_batch_size,
                plan.num_batches,
                plan.cell_tokens,
                frozenset(plan.config.eos_token_ids),
                find_stop,
                spec.seed,
                partial(not_finite_message, dtype=plan.dtype, cache_bits=plan.policy.cache_bits),
                Admission(spec.spaces or (plan.space,)),
                least_batches=_overlapping_batches(plan, len(spec.spaces)),
            )
            self.handlers = OpHandlers(
                plan, weights, self.scheduler, self.tiers, attend, on_device, spec.number
            )
            self._workers: list[LaneWorker] | None = None
            self._modelled: Modelled | None = None
            self._meter = Meter()
            self._watch = OpWatch(self.handlers.run)
            self._wall = 0.0
            self._visits: list[VisitTiming] = []
        except BaseException:
            self.close()
            raise

    @torch.inference_mode()
    def run(
        self, requests: Iterable[Request], on_logits: LogitsHook | None = None
    ) -> Iterator[Finished | Progress]:
        """Generate; yields each request's answer as it finishes, and a Progress after each visit.

        on_logits(request indices, logits [rows, vocabulary]) is called before tokens are sampled.
        """
        plan, handlers = self.spec.plan, self.handlers
        handlers.begin(on_logits)
        self.scheduler.clear()
        self.scheduler.add(requests)
        if plan.stage.is_whole and self.scheduler.is_done:
            return
        executor, batches = self._start(), plan.policy.num_gpu_batches
        mixtures = plan.mixtures if self._modelled is None else self._modelled.mixtures
        running = executor.run(zigzag(plan.stage, batches, count(), plan.num_blocks, mixtures))
        began = started = time.perf_counter()
        with closing(running), _torch_threads(self._cores.device):
            for op in running:
                now = time.perf_counter()
                self._wall = now - began
                # Asked before the finished requests are taken, because lanes may be a visit ahead.
                is_done = handlers.passes.is_over(op.visit)
                # No `yield from`: Ray sends into its generators, and an iterator can't receive.
                for finished in self.scheduler.take_finished():  # noqa: UP028
                    yield finished
                yield self._progress(op.visit, now - started)
                started = time.perf_counter()
                if is_done:
                    return

    def measured(self) -> StageMeasurements:
        """Measurements of the last run: how busy lanes were, and modelled seconds if asked for."""
        busy = self.busy()
        on_cuda = self.tiers.device.type == "cuda"
        peak = torch.cuda.max_memory_reserved(self.tiers.device) if on_cuda else 0
        if self._modelled is None:
            return StageMeasurements(
                self._wall,
                busy,
                visits=self._visits,
                peak_gpu_bytes=peak,
                sampling=self._meter.sampling,
                recomputed_tokens=self.scheduler.recomputed_tokens,
            )
        lanes = self._modelled.lanes()
        return StageMeasurements(
            wall=self._wall,
            busy=busy,
            modelled_lanes=lanes,
            modelled_resources=self._modelled.resources(),
            cores=0.0 if on_cuda or self._modelled.is_emulated else self._cores.seconds(lanes),
            hardware=self.spec.hardware,
            is_emulated=self._modelled.is_emulated,
            visits=self._visits,
            peak_gpu_bytes=peak,
            sampling=self._meter.sampling,
            recomputed_tokens=self.scheduler.recomputed_tokens,
        )

    def busy(self) -> dict[str, float]:
        """Seconds that each lane has been busy in the run so far; from any thread."""
        return {lane.value: seconds for lane, seconds in self._meter.busy.items() if seconds}

    @property
    def spans(self) -> list[Span]:
        """Times at which the ops of the last run ran, if the stage keeps these."""
        return self._meter.spans

    def _progress(self, visit: int, seconds: float) -> Progress:
        """Event of a visit that has ended."""
        modelled = self._modelled.end_visit(visit) if self._modelled else {}
        new, prefill, saved = self.handlers.passes.take_counts(visit)
        ended = self._meter.visit_ends.pop(visit)
        self._visits.append(VisitTiming(ended, new, prefill, modelled))
        scores = tuple(self.scheduler.take_scored())
        tokens = tuple(self.scheduler.take_accepted())
        return Progress(
            new, prefill, seconds, prefill > 0, tokens, scores=scores, saved_tokens=saved
        )

    def _start(self) -> SerialExecutor | AsyncExecutor:
        """Executor of a new run, with a new meter."""
        spec, handlers = self.spec, self.handlers
        self._meter = Meter(spec.keeps_spans)
        self._visits = []
        run: Run = handlers.run
        is_active = ActiveOps(spec.plan, in_ring=handlers.passes.channel is not None)
        if spec.hardware is not None:
            options = {} if spec.run_wrapper is None else spec.run_wrapper.options
            self._modelled = self._model(handlers, spec.plan, spec.hardware, **options)
            run, is_active = self._modelled.run, self._modelled.is_active
        self._watch = run = OpWatch(run)
        wait = device_wait(self.tiers.device)
        if wait is not None:
            # Writes on other streams, of weights above all, must be complete.
            wait()
        if spec.executor == "serial":
            return SerialExecutor(run, is_active, self._meter, wait)
        if self._workers is None:
            attends_by_torch = self._attends_by_torch
            self._workers = make_lane_workers(self.tiers.device, self._cores, attends_by_torch)
        window = window_ops(spec.plan.policy.num_gpu_batches)
        return AsyncExecutor(run, is_active, self._workers, self._meter, self._cancel, window)

    def heartbeat(self) -> Heartbeat:
        """Progress of the run; from any thread."""
        return self._watch.heartbeat()

    def connect(self, channel: Channel | None) -> None:
        """Connect the stage to its neighbours; None if it is the whole model."""
        self.handlers.passes.channel = channel

    def _cancel(self) -> None:
        """End all waiting of ops under way; if the run is cut short, that of the neighbours too."""
        if self._modelled is not None:
            self._modelled.cancel()
        passes = self.handlers.passes
        if passes.channel is not None and passes.ended is None:
            passes.channel.close()

    def used(self) -> dict[str, dict[str, int]]:
        """Bytes that the stage holds, {tier: {kind of data: bytes}}."""
        return self.tiers.used()

    def close(self) -> None:
        """Free the offload files."""
        self.tiers.disk.close()
        self.tiers.cpu.close()


def _overlapping_batches(plan: StagePlan, num_stages: int) -> int:
    """Batches that keep all stages busy, each also while it waits for the host or the link."""
    is_resident = plan.hidden_stays and not plan.uses_host and not plan.uses_disk
    return max(num_stages, 1) * (1 if is_resident else 2)


def cores_for(plan: StagePlan, device: torch.device) -> Cores:
    """Cores of this process, divided for a stage with this plan."""
    on_cuda = device.type == "cuda"
    return divide_cores(torch.get_num_threads(), on_cuda, plan.attends_on_host)


def choose_host_kernel(plan: StagePlan, threads: int, nbytes: int) -> HostKernel:
    """Fastest kernel for a plan's attention on the host, compiled.

    nbytes: most memory to measure with, if the choice isn't known yet.
    """
    if not plan.attends_on_host:
        return load_kernel("sdpa", threads)
    return _choose_kernel(plan, threads, nbytes)


def choose_device_kernel(
    plan: StagePlan, device: torch.device, threads: int, nbytes: int
) -> HostKernel:
    """Fastest kernel for decoding rows on the device; arguments as choose_host_kernel's."""
    if device.type == "cuda" or not (plan.space.pages[0] or plan.space.streamed):
        return load_kernel("sdpa", threads)
    return _choose_kernel(plan, threads, nbytes)


def _choose_kernel(plan: StagePlan, threads: int, nbytes: int) -> HostKernel:
    config = plan.config
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    shape = AttentionShape(
        plan.dtype, *heads, plan.policy.cache_bits, plan.policy.attention_sparsity
    )
    with _torch_threads(threads):
        name = "numba"
        if not plan.walks_pages:
            name = choose_kernel(shape, threads, calibration_dir(), nbytes)
        return compiled_kernel(name, threads, shape)


def _weight_source(spec: StageSpec) -> WeightSource:
    if spec.model is None:
        return DummyWeights()
    return Checkpoint(spec.model, spec.plan.config)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let torch use a number of cores in this thread, as it does in the lanes' threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
