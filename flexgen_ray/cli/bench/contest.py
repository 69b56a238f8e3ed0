"""Runs the contestants of `bench peers` in turns, each run in a process of its own.

Knows processes and what can go wrong with them; not how a contestant does its work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from flexgen_ray.cli.bench.memory_cgroup import MemoryCgroup
from flexgen_ray.cli.bench.peer_task import OURS, PeerRun, PeerTask

MMAP_THRESHOLD = 256 * 2**10  # bytes from which malloc maps an allocation of its own

# Contestants, each with the packages that it needs and this project doesn't.
PACKAGES: dict[str, tuple[str, ...]] = {
    "transformers": (),
    "accelerate-cpu": ("accelerate",),
    "accelerate-disk": ("accelerate",),
    "deepspeed-cpu": ("deepspeed", "accelerate"),
    "deepspeed-nvme": ("deepspeed", "accelerate"),
    OURS: (),
}


@dataclass(frozen=True)
class Rules:
    """Contestants, rounds and limits of a contest; ValueError for an unknown contestant.

    batch_sizes: sizes that each peer tries in each round. timeout: seconds that one run may take.
    """

    peers: list[str]
    batch_sizes: list[int]
    rounds: int
    timeout: float

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
    missing = {peer: _not_installed(peer) for peer in rules.peers}
    entries: list[tuple[str, int | None]] = []
    for peer in rules.peers:
        entries += [(peer, size) for size in ([None] if peer == OURS or missing[peer] else sizes)]
    runs: list[PeerRun] = []

    for _ in range(rules.rounds):
        for peer, size in list(entries):
            reason = missing[peer]
            run = (
                PeerRun(peer, None, error=reason)
                if reason
                else _run_apart(work, peer, size, rules.timeout)
            )
            runs.append(run)
            on_run(run)
            if run.error:
                entries.remove((peer, size))
    return runs


def _not_installed(peer: str) -> str | None:
    """Sentence that names the packages to install for this peer; None if all are there."""
    missing = [package for package in PACKAGES[peer] if find_spec(package) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def _run_apart(work: PeerTask, peer: str, batch_size: int | None, timeout: float) -> PeerRun:
    """One run in a fresh process with a fresh offload folder, which is removed after it.

    peer: name of the contestant. batch_size: None for ours, whose policy sets it.
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
        task = {"peer": peer, "batch_size": batch_size, "work": mine}
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
            run = PeerRun(peer, batch_size, error=error)
        return run if cgroup is None else replace(run, peak_cgroup_bytes=cgroup.peak_bytes())


def _launch(
    command: list[str], cgroup: MemoryCgroup | None, log: Path, threads: int, timeout: float
) -> str:
    """Run the command to its end; returns a sentence on how it ended, for a run without figures."""
    with log.open("wb") as output:
        try:
            status = subprocess.run(
                command if cgroup is None else cgroup.wrap(command),
                env=_environment(threads),
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


def _environment(threads: int) -> dict[str, str]:
    """Environment variables of every contestant: the same number of threads, and no network.

    Freed memory returns to the system immediately. Else peers that allocate each layer and each
    longer cache again would keep ever more of it, and be killed in a small cgroup.
    """
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return dict(os.environ) | counts | quiet | {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
