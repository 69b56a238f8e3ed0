"""One contestant's run in this process: load, warm up, generate against the clock, report.

    python -m flexgen_ray.cli.bench.peer_runs WORK.json RUN.json

A process of its own keeps memory, threads and imports apart, and a crash costs one run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from flexgen_ray.calibration.steady import OtherLoad
from flexgen_ray.cli.bench import page_cache
from flexgen_ray.cli.bench.peer_task import OURS, PeerRun, PeerTask
from flexgen_ray.llm import LLM
from flexgen_ray.reporting.report import environment
from flexgen_ray.request import Request, SamplingParams
from flexgen_ray.runtime.worker import find_device

WARM_UP_PROMPTS, WARM_UP_TOKENS = 2, 2


class Contestant(Protocol):
    """A loaded model that generates; `details` are facts for the result."""

    @property
    def details(self) -> dict[str, Any]: ...

    def generate(
        self, prompts: list[list[int]], max_tokens: int, on_pass: Callable[[], None] | None
    ) -> list[list[int]]: ...


class Ours:
    """This project's LLM as a contestant, loaded for all prompts as `LLM.generate` does it.

    Computes each prompt whole, as the others do.
    """

    def __init__(self, work: PeerTask) -> None:
        self._llm = LLM(
            work.model,
            dtype=work.dtype,
            device=work.device,
            offload_dir=work.scratch,
            use_ray=False,
            enable_prefix_caching=False,
            **work.ours,  # type: ignore[arg-type]
        )
        self._llm.prepare(self._requests(work.prompts, work.max_tokens))

    @property
    def details(self) -> dict[str, Any]:
        """Report of the last generation, without the facts about the machine."""
        report = self._llm.report.as_dict()
        return {key: value for key, value in report.items() if key not in environment("")}

    def generate(
        self, prompts: list[list[int]], max_tokens: int, on_pass: Callable[[], None] | None
    ) -> list[list[int]]:
        """Greedy tokens of each prompt, in the prompts' order."""
        requests = self._requests(prompts, max_tokens)
        progress = None if on_pass is None else lambda _: on_pass()
        outputs = {output.index: output for output in self._llm.stream(requests, progress)}
        return [outputs[request.index].outputs[0].token_ids for request in requests]

    def _requests(self, prompts: list[list[int]], max_tokens: int) -> list[Request]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return [self._llm.request(index, prompt, params) for index, prompt in enumerate(prompts)]


def run(work: PeerTask, peer: str, batch_size: int | None, experts: str | None) -> PeerRun:
    """Load a contestant and time one run of it; raises the contestant's errors.

    batch_size: None for ours alone. experts: transformers' implementation; None for its own choice.
    """
    torch.set_num_threads(work.threads)
    device = find_device(work.device)
    uses_cuda = device.type == "cuda"
    if uses_cuda and work.gpu_memory is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(work.gpu_memory / total, 1.0))
    _prepare_page_cache(work)
    started = time.perf_counter()
    contestant = _load(work, peer, batch_size, experts, device)
    load_seconds = time.perf_counter() - started
    on_pass = _dropper(work)
    contestant.generate(work.prompts[:WARM_UP_PROMPTS], WARM_UP_TOKENS, on_pass)
    if work.page_cache == "cold":
        page_cache.drop([*work.model_files(), *page_cache.files_in(work.scratch)])
    elsewhere = OtherLoad()
    started = time.perf_counter()
    tokens = contestant.generate(work.prompts, work.max_tokens, on_pass)
    seconds = time.perf_counter() - started
    cores_elsewhere = elsewhere.cores
    lengths = {len(answer) for answer in tokens}
    if lengths != {work.max_tokens}:
        raise RuntimeError(f"asked for {work.max_tokens} tokens a prompt, got {sorted(lengths)}")
    return PeerRun(
        peer=peer,
        batch_size=batch_size,
        tokens=tokens,
        seconds=seconds,
        load_seconds=load_seconds,
        peak_rss_bytes=_peak_rss(),
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if uses_cuda else 0,
        cores_elsewhere=cores_elsewhere,
        device=torch.cuda.get_device_name() if uses_cuda else "CPU",
        details=contestant.details,
        experts=experts,
    )


def main() -> None:
    """Read the task's file and write the run's; the exit status is 1 if there are no figures."""
    source, target = map(Path, sys.argv[1:])
    task = json.loads(source.read_text(encoding="utf-8"))
    peer, batch_size, experts = task["peer"], task["batch_size"], task["experts"]
    try:
        result = run(PeerTask(**task["work"]), peer, batch_size, experts)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        result = PeerRun(peer, batch_size, error=reason, experts=experts)
    target.write_text(json.dumps(asdict(result)), encoding="utf-8")
    sys.exit(1 if result.error else 0)


def _load(
    work: PeerTask, peer: str, batch_size: int | None, experts: str | None, device: torch.device
) -> Contestant:
    if peer == OURS:
        return Ours(work)
    from flexgen_ray.cli.bench.hf_peers import PEERS

    assert batch_size is not None, "only our policy chooses its own"
    contestant = PEERS[peer](work, batch_size, device)
    if experts is not None:
        contestant.model.set_experts_implementation(experts)
    return contestant


def _prepare_page_cache(work: PeerTask) -> None:
    """Put the page cache into the state that the task asks for.

    With a memory limit the files are dropped first, since a cgroup isn't charged for pages that
    other processes read.
    """
    if work.page_cache == "cold" or work.memory_limit is not None:
        page_cache.drop(work.model_files())
    if work.page_cache == "warm":
        page_cache.read_once(work.model_files())


def _dropper(work: PeerTask) -> Callable[[], None] | None:
    """Function that drops all files from the page cache after each pass, for a cold cache.

    None with a memory limit, which keeps the files out of memory by itself.
    """
    if work.page_cache != "cold" or work.memory_limit is not None:
        return None
    return lambda: page_cache.drop([*work.model_files(), *page_cache.files_in(work.scratch)])


def _peak_rss() -> int:
    """Peak resident bytes of this process (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
