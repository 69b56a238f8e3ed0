"""Runs the contestants of `bench peers` in turns, each run in a process of its own.

Knows processes and what can go wrong with them; not how a contestant does its work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

from flexgen_ray.cli.bench.memory_cgroup import MemoryCgroup
from flexgen_ray.cli.bench.peer_task import OURS, PeerRun, PeerTask

MMAP_THRESHOLD = 256 * 2**10  # bytes from which malloc maps an allocation of its own

# Contestants, each with the packages that it needs and this project doesn't.
PACKAGES: dict[str, tuple[str, ...]] = {
    "transformers": (),
    "accelerate-cpu": ("accelerate",),
    "accelerate-disk": ("accelerate",),
    "airllm": ("airllm",),
    "deepspeed-cpu": ("deepspeed", "accelerate"),
    "deepspeed-nvme": ("deepspeed", "accelerate"),
    OURS: (),
}


class Setup(NamedTuple):
    """A way in which a contestant runs.

    batch_size: None for ours, whose policy sets it. experts: transformers' implementation of a
    mixture's experts; None for its own choice.
    """

    batch_size: int | None
    experts: str | None = None


@dataclass(frozen=True)
class Rules:
    """Contestants, rounds and limits of a contest; ValueError for an unknown contestant.

    batch_sizes, experts: what each peer tries in each round, in all combinations. timeout: seconds
    that one run may take. peer_batches: number of batches, the first ones, that each peer answers;
    None for all of them.
    """

    peers: list[str]
    batch_sizes: list[int]
    rounds: int
    timeout: float
    experts: Sequence[str | None] = (None,)
    peer_batches: int | None = None

    def __post_init__(self) -> None:
        unknown = [peer for peer in self.peers if peer not in PACKAGES]
        if unknown:
            raise ValueError(f"peer {unknown[0]!r} is unknown; there are {', '.join(PACKAGES)}")
        if self.rounds < 1:
            raise ValueError(f"repeats is {self.rounds}; it must be 1 or more")


def compete(work: PeerTask, rules: Rules, on_run: Callable[[PeerRun], None]) -> list[PeerRun]:
    """Run every contestant in each round; returns all runs in the order in which they took place.

    Contestants take turns (A B A B), since a shared machine's speed drifts. One that fails doesn't
    run again. on_run: called after each run. Raises OSError if a memory limit can't be set.
    """
    sizes = dict.fromkeys(min(size, len(work.prompts)) for size in rules.batch_sizes)
    setups = [Setup(*each) for each in product(sizes, rules.experts)]
    missing = {peer: _not_installed(peer) for peer in rules.peers}
    entries: list[tuple[str, Setup]] = []
    for peer in rules.peers:
        alone = peer == OURS or missing[peer]
        entries += [(peer, setup) for setup in ([Setup(None)] if alone else setups)]
    runs: list[PeerRun] = []

    for _ in range(rules.rounds):
        for peer, setup in list(entries):
            reason = missing[peer]
            run = (
                PeerRun(peer, None, error=reason)
                if reason
                else _run_apart(_share(work, setup, rules), peer, setup, rules.timeout)
            )
            runs.append(run)
            on_run(run)
            if run.error:
                entries.remove((peer, setup))
    return runs


def _share(work: PeerTask, setup: Setup, rules: Rules) -> PeerTask:
    """The task with as many prompts as a contestant is to answer."""
    if setup.batch_size is None or rules.peer_batches is None:
        return work
    return replace(work, prompts=work.prompts[: setup.batch_size * rules.peer_batches])


def _not_installed(peer: str) -> str | None:
    """Sentence that names the packages to install for this peer; None if all are there."""
    missing = [package for package in PACKAGES[peer] if find_spec(package) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def _run_apart(work: PeerTask, peer: str, setup: Setup, timeout: float) -> PeerRun:
    """One run in a fresh process with a fresh offload folder, which is removed after it.

    peer: name of the contestant.
    """
    limit = work.memory_limit
    with (
        tempfile.TemporaryDirectory(prefix=".peers-", dir=work.scratch) as folder,
        nullcontext() if limit is None else MemoryCgroup(limit) as cgroup,
    ):
        scratch = Path(folder, "offload")
        scratch.mkdir()
        source, target, log = (Path(folder, name) for name in ("work.json", "run.json", "log"))
        mine = asdict(replace(work, scratch=str(scratch)))
        task = {"peer": peer, **setup._asdict(), "work": mine}
        source.write_text(json.dumps(task), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "flexgen_ray.cli.bench.peer_runs",
            str(source),
            str(target),
        ]
        error = _launch(command, cgroup, log, work.threads, timeout)
        if target.is_file():
            run = PeerRun(**json.loads(target.read_text(encoding="utf-8")))
        else:
            run = PeerRun(peer, error=error, **setup._asdict())
        return run if cgroup is None else replace(run, peak_cgroup_bytes=cgroup.peak_bytes())


def _launch(
    command: list[str], cgroup: MemoryCgroup | None, log: Path, threads: int, timeout: float
) -> str:
    """Run the command to its end; returns a sentence on how it ended, for a run without figures."""
    with log.open("wb") as output:
        try:
            status = subprocess.run(
                command if cgroup is None else cgroup.wrap(command),
                env=_environment(threads, cgroup is not None),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:g} s; raise --timeout"
    if cgroup is not None and cgroup.killed_for_memory():
        return f"out of memory: killed in its {cgroup.describe()}"
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit status {status}: {said[-1] if said else 'it said nothing'}"


def _environment(threads: int, is_limited: bool) -> dict[str, str]:
    """Environment variables of every contestant: the same number of threads, and no network.

    With a memory limit freed memory returns to the system immediately. Else peers that allocate
    each layer and each longer cache again would keep ever more of it, and be killed.
    """
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    frees = {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)} if is_limited else {}
    return dict(os.environ) | counts | quiet | frees
