"""A memory cgroup for one process: its memory and page cache together stay below a limit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

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
