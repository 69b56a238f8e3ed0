"""The task that every contestant of `bench peers` does, and the run that it returns.

Both travel as JSON between two processes. Knows no contestant and none of their libraries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

OURS = "flexgen-ray"


@dataclass(frozen=True)
class PeerTask:
    """Task of a contest: generate exactly `max_tokens` greedy tokens for each prompt.

    model: a Hugging Face folder with safetensors. prompts: token ids. device: auto, cuda or cpu.
    page_cache: warm (files are read once before the timed run) or cold (dropped before it).
    memory_limit: bytes of each contestant's memory cgroup; None without one. gpu_memory: bytes that
    torch may take of the GPU; None for all of it. scratch: folder for offload files. ours: further
    arguments of our `LLM`.
    """

    model: str
    prompts: list[list[int]]
    max_tokens: int
    dtype: str
    device: str
    threads: int
    page_cache: str
    memory_limit: int | None
    gpu_memory: int | None
    scratch: str
    ours: dict[str, str | None] = field(default_factory=dict)

    def model_files(self) -> list[Path]:
        """The model's safetensors files, in the order of their names."""
        return sorted(Path(self.model).glob("*.safetensors"))


@dataclass(frozen=True)
class PeerRun:
    """One timed run of a contestant; `error` says why there are no figures.

    experts: transformers' implementation of a mixture's experts; None for its own choice. seconds:
    time of generating for all prompts, without loading and warm-up. peak_rss_bytes: VmHWM, loading
    included; mapped files count. peak_cgroup_bytes: page cache included. cores_elsewhere: cores
    that other processes kept busy during the run; from a few tenths up the figures mean little.
    details: facts that the contestant reports, such as our policy.
    """

    peer: str
    batch_size: int | None
    tokens: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    load_seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int = 0
    peak_cgroup_bytes: int | None = None
    cores_elsewhere: float = 0.0
    device: str = ""
    details: dict = field(default_factory=dict)
    error: str | None = None
    experts: str | None = None

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds if self.seconds else 0.0
