"""The front door: `LLM(model).generate(prompts, SamplingParams(...))`.

Turns prompts into requests, settles dtype, budget and policy before any work starts, and hands the
requests to a worker: a Ray actor, or this process. Knows text; no tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from flexgen_ray.config import Budget, Policy, Workload
from flexgen_ray.cost.default_policy import default_policy
from flexgen_ray.cost.sizes import StagePlan, check_budget
from flexgen_ray.models.registry import load_config
from flexgen_ray.report import Report
from flexgen_ray.request import (
    CompletionOutput,
    Finished,
    Progress,
    Request,
    RequestOutput,
    SamplingParams,
)
from flexgen_ray.runtime.stage import EXECUTORS, StageSpec
from flexgen_ray.runtime.worker import Machine, Worker
from flexgen_ray.schedule.zigzag import StageLayers
from flexgen_ray.tokenizer import Tokenizer
from flexgen_ray.units import format_bytes, parse_bytes

Prompt = str | Sequence[int]
GPU_SHARE = 0.9  # of the free memory, where no budget is given
HOST_SHARE = 0.8
DISK_SHARE = 0.9
CUDA_RESERVE = 96 * 2**20  # cuBLAS workspaces and what the allocator rounds up


class Backend(Protocol):
    """What a Worker in this process and a Driver of a Ray actor have in common."""

    def probe(self, device: str, offload_dir: str) -> Machine: ...
    def load(self, spec: StageSpec) -> None: ...
    def add(self, requests: list[Request]) -> None: ...
    def run(self) -> Iterator[Finished | Progress]: ...
    def used(self) -> dict[str, dict[str, int]]: ...
    def close(self) -> None: ...


class LLM:
    """A model ready to generate, larger than the GPU if need be.

    model: a Hugging Face folder. policy: a Policy, a YAML file, or None to fill the tiers from the
    fastest down. dtype: auto, float32, float16 or bfloat16. device: auto, cuda or cpu. *_memory:
    bytes or `16GiB`; what is free, less a margin, if None. use_ray: run in a Ray actor, on the
    cluster at `address` (or RAY_ADDRESS), or on one started for this run. executor: async runs
    loads, stores and host attention beside the device's work; serial one op after the other.

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
    ) -> None:
        if executor not in EXECUTORS:
            raise ValueError(f"executor is {executor!r}; it must be one of {', '.join(EXECUTORS)}")
        self.executor = executor
        self.model = Path(model)
        self.config = load_config(self.model)
        self.tokenizer = Tokenizer(self.model)
        self.policy = policy if isinstance(policy, Policy | None) else Policy.from_yaml(policy)
        self.seed = seed
        self.offload_dir = Path(offload_dir) if offload_dir else default_offload_dir()
        memory = {"gpu": gpu_memory, "cpu": cpu_memory, "disk": disk_memory}
        limits = {
            tier: None if size is None else parse_bytes(size) for tier, size in memory.items()
        }
        self._plan: StagePlan | None = None
        self.report = Report()
        self._backend, reserved = _start(use_ray, address, device)
        try:
            self.machine = self._backend.probe(device, str(self.offload_dir))
            self.budget = _budget(self.machine, limits, reserved)
            self.dtype = _dtype(dtype, self.config.dtype, self.machine)
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
        if not requests:
            return
        workload = Workload(
            num_requests=len(requests),
            max_prompt_len=max(len(request.prompt_token_ids) for request in requests),
            max_seq_len=max(request.max_seq_len for request in requests),
        )
        if self._plan is not None and self._plan.workload.covers(workload):
            return
        layers = StageLayers.whole(self.config.num_layers)
        policy = self.policy or default_policy(
            self.config, layers, workload, self.dtype, self.budget
        )
        plan = StagePlan(self.config, layers, policy, workload, self.dtype)
        check_budget(plan, self.budget)
        self._plan = None
        started = time.perf_counter()
        self._backend.load(
            StageSpec(
                model=str(self.model.resolve()),
                plan=plan,
                budget=self.budget,
                device=self.machine.device,
                offload_dir=str(self.offload_dir.resolve()),
                seed=self.seed,
                executor=self.executor,
            )
        )
        self._plan = plan
        self.report.load_seconds = time.perf_counter() - started

    def stream(
        self, requests: list[Request], on_progress: Callable[[Progress], None] | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs as they finish; `report` then tells how it went."""
        load_seconds = self.report.load_seconds
        self.report = Report(load_seconds=load_seconds)
        if not requests:
            return
        assert self._plan is not None, "prepare comes first"
        by_index = {request.index: request for request in requests}
        self._backend.add(requests)
        for event in self._backend.run():
            if isinstance(event, Progress):
                self.report.add(event)
                if on_progress:
                    on_progress(event)
            else:
                self.report.num_requests += 1
                yield self._output(by_index[event.index], event)
        self.report.finish(self._plan, self.budget, self.machine, self._backend.used())

    def close(self) -> None:
        """Stops the worker; memory and offload files are given back."""
        self._backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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


def default_offload_dir() -> Path:
    """In the user's cache, not in /tmp, which is often memory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flexgen_ray" / "offload"


def _start(use_ray: bool, address: str | None, device: str) -> tuple[Backend, int]:
    """The worker, and the host memory that Ray takes beside it."""
    if not use_ray:
        return Worker(), 0
    from flexgen_ray.distributed.driver import Driver

    driver = Driver(address, device)
    return driver, driver.reserved_cpu_bytes


def _budget(machine: Machine, limits: dict[str, int | None], reserved: int) -> Budget:
    """Given limits as they stand, free memory less a margin for the others.

    Without CUDA the gpu tier is host memory too, so the two share what is free.
    """
    share = GPU_SHARE if machine.device == "cuda" else HOST_SHARE / 2
    gpu, cpu, disk = limits["gpu"], limits["cpu"], limits["disk"]
    gpu = int(machine.gpu_bytes * share) if gpu is None else gpu
    host = HOST_SHARE * machine.cpu_bytes - (0 if machine.device == "cuda" else gpu)
    cpu = max(int(host), 0) if cpu is None else cpu
    disk = int(machine.disk_bytes * DISK_SHARE) if disk is None else disk
    if cpu < reserved:
        raise ValueError(
            f"--cpu-memory {format_bytes(cpu)} is less than the {format_bytes(reserved)} that "
            "Ray's object store takes; raise it, or use --no-ray"
        )
    for tier, size, free in (
        ("gpu", gpu, machine.gpu_bytes),
        ("cpu", cpu, machine.cpu_bytes),
        ("disk", disk, machine.disk_bytes),
    ):
        if size > free:
            raise ValueError(
                f"--{tier}-memory {format_bytes(size)} is more than the {format_bytes(free)} free "
                f"on {machine.host}; lower it"
            )
    if machine.device == "cuda":
        gpu = max(gpu - CUDA_RESERVE, 0)
    return Budget(gpu, cpu - reserved, disk)


def _dtype(wanted: str, checkpoint: str, machine: Machine) -> str:
    """auto: the checkpoint's on a GPU; on the CPU float32 unless it is fast in bfloat16."""
    if wanted not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {wanted!r} is unknown; use auto, float32, float16 or bfloat16")
    if wanted != "auto":
        return wanted
    if machine.device == "cuda":
        return checkpoint
    is_bfloat16 = checkpoint == "bfloat16" and machine.is_fast_in_bfloat16
    return "bfloat16" if is_bfloat16 else "float32"
