"""A memory cgroup for one process: its memory and page cache together stay below a limit. Linux.

Knows cgroups v1 and v2; not what the process does.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from flexgen_ray.units import format_bytes

_ROOT = Path("/sys/fs/cgroup")
_REMOVAL_SECONDS = 10.0
# Files of a cgroup: that of cgroup v1, and that of cgroup v2.
_FILES = {
    "limit": ("memory.limit_in_bytes", "memory.max"),
    "swap": ("memory.memsw.limit_in_bytes", "memory.swap.max"),
    "peak": ("memory.max_usage_in_bytes", "memory.peak"),
    "events": ("memory.oom_control", "memory.events"),
}


class MemoryCgroup:
    """Memory cgroup with a limit in bytes, made on entry and removed on exit.

    Processes that still run in it at its exit are killed. Raises OSError, with the remedy, where
    this user may not make one.
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
        """Command line that runs the command in the cgroup from its first allocation on."""
        procs = str(self.folder / "cgroup.procs")
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *command]

    def peak_bytes(self) -> int | None:
        """Largest number of bytes in use so far; None where the kernel doesn't say."""
        path = self._file("peak")
        return int(path.read_text()) if path.exists() else None

    def killed_for_memory(self) -> bool:
        """True if the kernel killed a process here because the limit was reached."""
        lines = self._file("events").read_text().splitlines()
        return any(line.split()[0] == "oom_kill" and line.split()[1] != "0" for line in lines)

    def describe(self) -> str:
        """Words for an error, such as `memory cgroup of 1.0 GiB`."""
        return f"memory cgroup of {format_bytes(self.limit)}"

    def _file(self, kind: str) -> Path:
        return self.folder / _FILES[kind][self._is_v2]

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
    """Folder in which a cgroup can be made.

    With cgroup v1 that is our own cgroup; with v2 its parent, since only leaves hold processes.
    """
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
    """The error with what a user can do about it."""
    return OSError(
        error.errno,
        f"cannot make a memory cgroup ({os.strerror(error.errno or 0)}); run as root where "
        "the memory controller is delegated (in a container: docker run --privileged "
        "--cgroupns=host), or leave --memory-limit out",
        str(error.filename or _ROOT),
    )
