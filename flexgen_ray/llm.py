"""The front door: `LLM(model).generate(prompts, SamplingParams(...))`.

Turns prompts into requests, settles dtype, budget and policy before any work starts, and hands the
requests to a worker: a Ray actor, or this process. Knows text; no tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from flexgen_ray.backend import start_backend
from flexgen_ray.config import HardwareSpec, Policy, Workload
from flexgen_ray.cost.default_policy import default_policy
from flexgen_ray.cost.sizes import StagePlan, check_budget
from flexgen_ray.models.registry import load_config
from flexgen_ray.models.shapes import shape_config
from flexgen_ray.paths import default_offload_dir
from flexgen_ray.report import Report
from flexgen_ray.request import (
    CompletionOutput,
    Finished,
    Progress,
    Request,
    RequestOutput,
    SamplingParams,
)
from flexgen_ray.resources import settle_budget, settle_dtype
from flexgen_ray.runtime.meter import Span
from flexgen_ray.runtime.stage import EXECUTORS, StageSpec
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.tokenizer import Tokenizer
from flexgen_ray.trace import write_trace
from flexgen_ray.units import parse_bytes

Prompt = str | Sequence[int]
SPANS_PER_CALL = 50_000


class LLM:
    """A model ready to generate, larger than the GPU if need be.

    model: a Hugging Face folder; with load_format="dummy", which makes weights up, also the name of
    a built-in shape (models/shapes.py). policy: a Policy, a YAML file, or None to fill the tiers
    from the fastest down. dtype: auto, float32, float16 or bfloat16. device: auto, cuda or cpu.
    *_memory: bytes or `16GiB`; what is free, less a margin, if None. use_ray: run in a Ray actor,
    on the cluster at `address` (or RAY_ADDRESS), or on one started for this run. executor: async
    runs loads, stores, disk and host attention beside the device's work; serial, its oracle, runs
    one op after the other and gives the same bits. pace: emulate this hardware, each modelled
    second taking time_scale seconds. hardware: sum beside the run what its ops should take there;
    "measured" measures this machine's rates first. trace: keep every op's times, for `write_trace`.

    Raises ValueError or OSError, with the numbers, for what can't work. Use it as a context manager
    or call `close`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        policy: Policy | str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        gpu_memory: str | int | None = None,
        cpu_memory: str | int | None = None,
        disk_memory: str | int | None = None,
        offload_dir: str | Path | None = None,
        use_ray: bool = True,
        address: str | None = None,
        seed: int = 0,
        executor: str = "async",
        pace: HardwareSpec | None = None,
        time_scale: float = 1.0,
        hardware: HardwareSpec | str | None = None,
        trace: bool = False,
        load_format: str = "auto",
    ) -> None:
        if executor not in EXECUTORS:
            raise ValueError(f"executor is {executor!r}; it must be one of {', '.join(EXECUTORS)}")
        if not time_scale > 0:
            raise ValueError(f"time_scale is {time_scale!r}; it must be above 0")
        if isinstance(hardware, str) and hardware != "measured":
            raise ValueError(f'hardware is {hardware!r}; it must be a HardwareSpec or "measured"')
        self._measures = hardware == "measured" and pace is None
        self._execution: dict[str, Any] = {
            "executor": executor,
            "hardware": pace or (None if isinstance(hardware, str) else hardware),
            "time_scale": time_scale if pace else None,
            "keeps_spans": trace,
        }
        if load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format is {load_format!r}; it must be auto or dummy")
        self.model = Path(model)
        self._is_dummy = load_format == "dummy"
        is_shape = self._is_dummy and not self.model.exists()
        self.config = shape_config(str(model)) if is_shape else load_config(self.model)
        self.tokenizer = Tokenizer(self.model)
        self.policy = policy if isinstance(policy, Policy | None) else Policy.from_yaml(policy)
        self.seed = seed
        self.offload_dir = Path(offload_dir or default_offload_dir()).resolve()
        memory = {"gpu": gpu_memory, "cpu": cpu_memory, "disk": disk_memory}
        limits = {
            tier: None if size is None else parse_bytes(size) for tier, size in memory.items()
        }
        self._plan: StagePlan | None = None
        self._run: Generator[Finished | Progress] | None = None
        self.report = Report()
        self._backend, reserved = start_backend(use_ray, address, device)
        try:
            self.machine = self._backend.probe(device, str(self.offload_dir))
            if pace and self.machine.device == "cuda":
                raise ValueError("pace emulates hardware with CPU ops; give device=cpu with it")
            self.budget = settle_budget(self.machine, limits, reserved)
            self.dtype = settle_dtype(dtype, self.config.dtype, self.machine)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One output a prompt, in input order. Prompts are texts or lists of token ids."""
        several = _several(prompts)
        params = sampling_params or SamplingParams()
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

    def request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        """A request that will fit the model; ValueError says why it can't.

        An answer that would outgrow the context ends there, with finish_reason "length".
        """
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        limit = self.config.max_seq_len
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(token_ids) >= limit:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, but the model's context is {limit} "
                "tokens, and one must be left for the answer; shorten the prompt"
            )
        wrong = [token for token in token_ids if not 0 <= token < self.config.vocab_size]
        if wrong:
            raise ValueError(
                f"token id {wrong[0]} is outside the vocabulary of {self.config.vocab_size}"
            )
        if params.stop and not self.tokenizer.exists:
            raise ValueError(f"stop strings need a tokenizer, which {self.model} lacks")
        room = limit - len(token_ids)
        return Request(index, token_ids, replace(params, max_tokens=min(params.max_tokens, room)))

    def prepare(self, requests: list[Request]) -> None:
        """Settles the policy, checks the budget, loads the weights unless what is loaded serves."""
        self._refuse_while_running()
        if not requests:
            return
        workload = Workload(
            # How many there are matters to the default policy alone.
            num_requests=1 if self.policy else len(requests),
            max_prompt_len=max(len(request.prompt_token_ids) for request in requests),
            max_seq_len=max(request.max_seq_len for request in requests),
        )
        if self._plan is not None and self._plan.workload.covers(workload):
            return
        layers = StageLayers.whole(self.config.num_layers)
        is_gpu = self.machine.device == "cuda" or self._execution["time_scale"] is not None
        policy = self.policy or default_policy(
            self.config, layers, workload, self.dtype, self.budget, is_gpu
        )
        plan = StagePlan(self.config, layers, policy, workload, self.dtype, is_gpu)
        check_budget(plan, self.budget)
        self._plan = None
        started = time.perf_counter()
        spec = StageSpec(
            model=None if self._is_dummy else str(self.model.resolve()),
            plan=plan,
            budget=self.budget,
            device=self.machine.device,
            offload_dir=str(self.offload_dir),
            seed=self.seed,
            **self._execution,
        )
        if self._measures:
            spec = replace(spec, hardware=self._backend.rates(spec))
        self._backend.load(spec)
        self._plan = plan
        self.report.load_seconds = time.perf_counter() - started

    def stream(
        self, requests: list[Request], on_progress: Callable[[Progress], None] | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs as they finish; `report` then tells how it went.

        One stream at a time. Left before its end it takes the loaded weights with it: the next
        `prepare` loads them again.
        """
        self._refuse_while_running()
        self.report = Report(load_seconds=self.report.load_seconds)
        if not requests:
            return
        assert self._plan is not None, "prepare comes first"
        self._backend.add(requests)
        self._run = cast(Generator[Finished | Progress], self._backend.run())
        try:
            yield from self._outputs(self._run, requests, on_progress)
            backend = self._backend
            self.report.finish(
                self._plan, self.budget, self.machine, backend.used(), backend.measured()
            )
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
        write_trace(Path(path), self._spans(), self.report.measured.is_emulated)

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
        requests: list[Request],
        on_progress: Callable[[Progress], None] | None,
    ) -> Iterator[RequestOutput]:
        missing = {request.index: request for request in requests}
        for event in run:
            if isinstance(event, Progress):
                self.report.add(event)
                if on_progress:
                    on_progress(event)
            else:
                self.report.num_requests += 1
                yield self._output(missing.pop(event.index), event)
        if missing:
            raise RuntimeError(f"the LLM was closed with {len(missing)} requests unanswered")

    def _spans(self) -> Iterator[Span]:
        """In pieces that a small object store can hold."""
        first = 0
        while spans := self._backend.spans(first, SPANS_PER_CALL):
            yield from spans
            first += len(spans)

    def _refuse_while_running(self) -> None:
        if self._run is not None:
            raise RuntimeError("this LLM is generating; finish or close its stream first")

    def _stop_run(self) -> None:
        """Every lane of the stage has stopped when this returns."""
        if self._run is not None:
            self._run.close()
            self._run = None
            self._plan = None

    def _output(self, request: Request, finished: Finished) -> RequestOutput:
        text = self.tokenizer.decode(finished.token_ids) if self.tokenizer.exists else ""
        cuts = [text.find(stop) for stop in request.params.stop if stop in text]
        text = text[: min(cuts)] if cuts else text
        answer = CompletionOutput(text, finished.token_ids, finished.finish_reason)
        return RequestOutput(request.index, None, list(request.prompt_token_ids), [answer])


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, a text or a list of token ids, stands for a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(token, int) for token in prompts):
        return [cast(Sequence[int], prompts)]
    return cast(list[Prompt], list(prompts))
