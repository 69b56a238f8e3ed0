"""Runs the contestants one after the other, each run in a fresh process, and takes turns.

Knows processes, memory cgroups and what can go wrong with either; not how the work is done.

A memory cgroup for one process: its memory and page cache together stay below a limit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from flexgen_ray.cli.bench.peer_task import OURS, PeerRun, PeerTask
from flexgen_ray.units import format_bytes

_ROOT = Path("/sys/fs/cgroup")
_REMOVAL_SECONDS = 10.0
# What is asked of a cgroup: cgroup v1's file, and cgroup v2's.
_FILES = {
    "limit": ("memory.limit_in_bytes", "memory.max"),
    "swap": ("memory.memsw.limit_in_bytes", "memory.swap.max"),
    "peak": ("memory.max_usage_in_bytes", "memory.peak"),
    "events": ("memory.oom_control", "memory.events"),
}


class MemoryCgroup:
    """Made on entry, removed on exit with all that still runs in it.

    Raises OSError, with the remedy, where this user may not make one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._is_v2 = not (_ROOT / "memory").is_dir()
        self.folder = _parent(self._is_v2) / f"flexgen-ray-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> MemoryCgroup:
        try:
            self.folder.mkdir()
        except OSError as error:
            raise _refused(error) from error
        try:
            self._file("limit").write_text(str(self.limit))
            if self._file("swap").exists():
                self._file("swap").write_text("0" if self._is_v2 else str(self.limit))
        except OSError as error:
            self._remove()
            raise _refused(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def wrap(self, command: list[str]) -> list[str]:
        """The command, in the cgroup from its first byte on."""
        procs = str(self.folder / "cgroup.procs")
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *command]

    def peak_bytes(self) -> int | None:
        """The most that was charged so far; None where the kernel doesn't tell."""
        path = self._file("peak")
        return int(path.read_text()) if path.exists() else None

    def killed_for_memory(self) -> bool:
        """Whether the kernel killed a process here because the limit was reached."""
        lines = self._file("events").read_text().splitlines()
        return any(line.split()[0] == "oom_kill" and line.split()[1] != "0" for line in lines)

    def describe(self) -> str:
        return f"memory cgroup of {format_bytes(self.limit)}"

    def _file(self, what: str) -> Path:
        return self.folder / _FILES[what][self._is_v2]

    def _remove(self) -> None:
        deadline = time.monotonic() + _REMOVAL_SECONDS
        while True:
            try:
                for pid in (self.folder / "cgroup.procs").read_text().split():
                    os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
            try:
                return self.folder.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def _parent(is_v2: bool) -> Path:
    """Where a cgroup can be made: v1 beneath our own; v2 beside it, for only leaves hold tasks."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if not is_v2 and "memory" in controllers.split(","):
            folder = _ROOT / "memory" / own.lstrip("/")
            return folder if folder.is_dir() else _ROOT / "memory"
        if is_v2 and not controllers:
            folder = (_ROOT / own.lstrip("/")).parent if own != "/" else _ROOT
            return folder if folder.is_dir() else _ROOT
    return _ROOT


def _refused(error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"cannot make a memory cgroup ({os.strerror(error.errno or 0)}); run as root where "
        "the memory controller is delegated (in a container: docker run --privileged "
        "--cgroupns=host), or leave --memory-limit out",
        str(error.filename or _ROOT),
    )


MMAP_THRESHOLD = 256 * 2**10  # bytes from which a peer's malloc maps what it gives

# Every contestant, and the packages it needs that this project doesn't.
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
    """batch_sizes: of the peers, each tried in each round. timeout: seconds of one run.

    Raises ValueError for an unknown contestant.
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
    """All runs, in the order in which they took place: A B A B, since machines drift.

    A contestant that fails is not asked again. Raises OSError if a memory limit can't be had.
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
    missing = [package for package in PACKAGES[peer] if find_spec(package) is None]
    return f"not installed: pip install {' '.join(missing)}" if missing else None


def _run_apart(work: PeerTask, peer: str, batch_size: int | None, timeout: float) -> PeerRun:
    """A run in a process of its own, with an offload folder of its own; both end with it."""
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
    """Runs the command to its end; returns how it ended, in words."""
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
    """Ours, with one number of threads for everyone and nothing from the network.

    Freed memory goes back to the system at once: else peers that allocate every layer and every
    longer cache anew keep ever more of it, and are killed in a small cgroup.
    """
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return dict(os.environ) | counts | quiet | {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
