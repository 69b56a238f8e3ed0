"""The front door: `LLM(model).generate(prompts, SamplingParams(...))`.

Turns prompts into requests, settles dtype, budget and policy before any work starts, and hands the
requests to a worker: a Ray actor, or this process. Knows text; no tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from flexgen_ray.auto_policy import Run
from flexgen_ray.backend import execution, spans, start_backend
from flexgen_ray.config import Faults, HardwareSpec, Policy, Workload
from flexgen_ray.cost.plan import StagePlan
from flexgen_ray.events import Progress
from flexgen_ray.fitting import generation, scoring
from flexgen_ray.messages import several_chats
from flexgen_ray.model_defaults import model_defaults
from flexgen_ray.models.checkpoint import checkpoint_config
from flexgen_ray.models.registry import load_config
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.paths import default_offload_dir, find_model
from flexgen_ray.report import Report, StageReport
from flexgen_ray.request import (
    Finished,
    Prompt,
    Request,
    RequestOutput,
    SamplingParams,
    several_prompts,
)
from flexgen_ray.resources import settle_budgets, settle_dtype
from flexgen_ray.runtime.stage import StageSpec
from flexgen_ray.samples import Samples
from flexgen_ray.stage_policies import StagePolicies
from flexgen_ray.tokenizer import Tokenizer
from flexgen_ray.trace import write_trace
from flexgen_ray.units import parse_bytes


class LLM:
    """A model ready to generate, larger than the GPU if need be.

    model: a Hugging Face folder, or a name on its hub; with load_format="dummy", which makes
    weights up, also a built-in shape (models/shapes.py). policy: a Policy for every stage,
    StagePolicies, a YAML file of either, or None: planned, or where rates aren't calibrated, the
    tiers are filled from the fastest down. *_memory:
    bytes or `16GiB`; what is free, less a margin, if None. pipeline_parallel_size: the number of
    stages, or auto, one for every GPU. use_ray: run each in a Ray actor, on the cluster at
    `address` (or RAY_ADDRESS), or on one started for this run; faults: what is borne there.
    executor: async runs loads, stores, disk and host attention beside the device's work; serial,
    its oracle, gives the same bits. pace: emulate this hardware, each modelled second taking
    time_scale seconds. hardware: sum beside the run what its ops should take there; "measured"
    measures this machine's rates first. trace: keep every op's times, for `write_trace`. lossy:
    weight_bits, embedding_bits, cache_bits, attention_sparsity as in Policy, over what it says.

    Raises ValueError or OSError, with the numbers, for what can't work. Use it as a context manager
    or call `close`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        policy: Policy | StagePolicies | str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        gpu_memory: str | int | None = None,
        cpu_memory: str | int | None = None,
        disk_memory: str | int | None = None,
        offload_dir: str | Path | None = None,
        pipeline_parallel_size: int | str = 1,
        use_ray: bool = True,
        address: str | None = None,
        transport: str = "auto",
        faults: Faults | None = None,
        seed: int = 0,
        executor: str = "async",
        pace: HardwareSpec | None = None,
        time_scale: float = 1.0,
        hardware: HardwareSpec | str | None = None,
        trace: bool = False,
        load_format: str = "auto",
        **lossy: int | float | None,
    ) -> None:
        self._measures = hardware == "measured" and pace is None
        self._execution = execution(executor, pace, time_scale, hardware, trace)
        if load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format is {load_format!r}; it must be auto or dummy")
        self._is_dummy = load_format == "dummy"
        is_shape = self._is_dummy and not Path(model).exists()
        self.model = Path(model) if is_shape else find_model(model)
        # A name is looked up on each stage's node.
        self._name = str(self.model if Path(model).is_dir() else model)
        read_config = load_config if self._is_dummy else checkpoint_config
        self.config = shape_config(str(model)) if is_shape else read_config(self.model)
        self.tokenizer = Tokenizer(self.model, self.config.vocab_size)
        packed = {it: getattr(self.config, it) for it in ("weight_bits", "embedding_bits")}
        self._base = Policy(**packed).compressed(**lossy)
        given = StagePolicies.given(policy)
        self.policies = given and given.compressed(**lossy).completed(**packed)
        self.seed = seed
        self.offload_dir = Path(offload_dir or default_offload_dir()).resolve()
        memory = {"gpu": gpu_memory, "cpu": cpu_memory, "disk": disk_memory}
        limits = {
            tier: None if size is None else parse_bytes(size) for tier, size in memory.items()
        }
        self._plans: list[StagePlan] | None = None
        self._run: Generator[Finished | Progress] | None = None
        self.report = Report()
        self._backend, reserved = start_backend(
            use_ray, address, device, pipeline_parallel_size, faults or Faults(), transport
        )
        try:
            self.machines = self._backend.probe(device, str(self.offload_dir))
            if pace and self.machines[0].device == "cuda":
                raise ValueError("pace emulates hardware with CPU ops; give device=cpu with it")
            self.budgets = settle_budgets(self.machines, limits, reserved)
            self.dtype = settle_dtype(dtype, self.config.dtype, self.machines)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One output a prompt, in input order. Prompts are texts or lists of token ids.

        Without sampling_params they are the model's own.
        """
        several = several_prompts(prompts)
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        each = [params] * len(several) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(several):
            raise ValueError(f"{len(several)} prompts but {len(each)} sampling_params; match them")
        requests = [
            self.request(i, *pair) for i, pair in enumerate(zip(several, each, strict=True))
        ]
        self.prepare(requests)
        outputs = {output.index: output for output in self.stream(requests)}
        texts = [prompt if isinstance(prompt, str) else None for prompt in several]
        return [replace(outputs[index], prompt=text) for index, text in enumerate(texts)]

    def chat(
        self,
        messages: Sequence,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The same for chats, lists of {"role": ..., "content": ...}, worded as the model's are."""
        chats = [self.tokenizer.chat(chat) for chat in several_chats(messages)]
        return self.generate(chats, sampling_params)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says, and the usual for the rest."""
        return SamplingParams(**({} if self._is_dummy else model_defaults(self.model)))

    def request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        """A request that will fit the model; ValueError says why it can't.

        An answer that would outgrow the context ends there, with finish_reason "length".
        """
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if params.stop and not self.tokenizer.exists:
            raise ValueError(f"stop strings need a tokenizer, which {self.model} lacks")
        return generation(index, token_ids, params, self.config)

    def score_request(
        self, index: int, token_ids: Sequence[int], first: int, in_decode: bool = False
    ) -> Request:
        """A request that doesn't generate: its output has the `scores` of tokens from `first` on.

        in_decode: these are fed one by one, and show what decoding does; else they are prefilled.
        ValueError says why it doesn't fit the model.
        """
        return scoring(index, list(token_ids), first, in_decode, self.config)

    def prepare(self, requests: list[Request]) -> None:
        """Settles the policy, checks the budget, loads the weights unless what is loaded serves."""
        self._refuse_while_running()
        if not requests:
            return
        self.tokenizer.check()
        requests = Samples(requests).requests
        workload = Workload(
            # How many there are matters to the default policy alone.
            num_requests=1 if self.policies else len(requests),
            max_prompt_len=max(len(request.prompt_token_ids) for request in requests),
            max_seq_len=max(request.max_seq_len for request in requests),
            resumes=self._backend.resumes,
        )
        if self._plans is not None and self._plans[0].workload.covers(workload):
            return
        hops_on_device = self.machines[0].device == "cuda" and self._backend.uses_nccl
        run = Run(self.config, self.dtype, self._stages_disk, hops_on_device, workload, self._base)
        found = run.plan(self.policies, self.machines, self.budgets, requests)
        self._plans = None
        started = time.perf_counter()
        model = None if self._is_dummy else self._name
        common = self._execution | {"offload_dir": str(self.offload_dir), "seed": self.seed}
        specs = [
            StageSpec(model, plan, budget, machine.device, **common)
            for plan, budget, machine in zip(found.stages, self.budgets, self.machines, strict=True)
        ]
        if self._measures:
            rates = self._backend.rates(specs[0])
            specs = [replace(spec, hardware=rates) for spec in specs]
        elif found.rates and self._execution["hardware"] is None:
            pairs = zip(specs, found.rates, strict=True)
            specs = [replace(spec, hardware=rates) for spec, rates in pairs]
        self._backend.load(specs)
        self._plans = found.stages
        self.report = Report(time.perf_counter() - started, found.predicted)

    @property
    def _stages_disk(self) -> bool:
        return self.machines[0].device == "cuda" or self._execution["time_scale"] is not None

    def stream(
        self, requests: list[Request], on_progress: Callable[[Progress], None] | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs as they finish; `report` then tells how it went.

        One stream at a time. Left before its end it takes the loaded weights with it: the next
        `prepare` loads them again.
        """
        self._refuse_while_running()
        self.report = Report(self.report.load_seconds, self.report.planned)
        if not requests:
            return
        assert self._plans is not None, "prepare comes first"
        samples = Samples(requests)
        self._backend.add(samples.requests)
        self._run = cast(Generator[Finished | Progress], self._backend.run())
        try:
            yield from self._outputs(self._run, samples, on_progress)
            self.report.recoveries = self._backend.recoveries
            found = self._plans, self.budgets, self.machines
            used, measured = self._backend.used(), self._backend.measured()
            self.report.stages = list(map(StageReport, *found, used, measured))
        except BaseException:
            if self._run is not None:
                self._stop_run()
                self._backend.abort()
            raise
        finally:
            self._run = None

    def write_trace(self, path: str | Path) -> None:
        """The last run's ops as a Chrome trace, if the LLM was made with trace=True."""
        if not self._execution["keeps_spans"]:
            raise ValueError("no trace was kept; make the LLM with trace=True")
        stages = [spans(self._backend, stage) for stage in range(len(self.report.stages))]
        write_trace(Path(path), stages, self._execution["time_scale"] is not None)

    def close(self) -> None:
        """Stops the worker, in the middle of a stream too; memory and files are given back."""
        self._stop_run()
        self._backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outputs(
        self,
        run: Iterator[Finished | Progress],
        samples: Samples,
        on_progress: Callable[[Progress], None] | None,
    ) -> Iterator[RequestOutput]:
        for event in run:
            if isinstance(event, Progress):
                self.report.add(event)
                if on_progress:
                    on_progress(event)
            else:
                output = samples.take(event, self.tokenizer)
                if output is not None:
                    self.report.num_requests += 1
                    yield output
        if samples.num_unanswered:
            raise RuntimeError(
                f"the LLM was closed with {samples.num_unanswered} requests unanswered"
            )

    def _refuse_while_running(self) -> None:
        if self._run is not None:
            raise RuntimeError("this LLM is generating; finish or close its stream first")

    def _stop_run(self) -> None:
        """Every lane of the stage has stopped when this returns."""
        if self._run is not None:
            self._run.close()
            self._run = None
            self._plans = None
