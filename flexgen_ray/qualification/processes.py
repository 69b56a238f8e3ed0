"""Runs a command in a session of its own with a time limit, and leaves no process behind.

Knows processes; not what they do.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

# Marks every process of a command by a value of its own, even those that begin new sessions.
MARK = "FLEXGEN_RAY_QUALIFY_MARK"
# Freeing tens of GiB of pinned memory takes a killed process this long at most.
_LAST_SECONDS = 30
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Ended:
    """The end of a command.

    exit_status: None if it was killed at its limit. num_killed: processes that had to be killed,
    its children included.
    """

    exit_status: int | None
    seconds: float
    num_killed: int


def run_limited(
    command: Sequence[str], limit_s: float, log: Path, environment: Mapping[str, str]
) -> Ended:
    """Run a command until it ends or its limit in seconds is over; then kill all its processes.

    The log gets its output. The command's folder for temporary files is removed at the end.
    environment: variables to set beside those of this process.
    """
    started = time.monotonic()
    mark, scratch = secrets.token_hex(16), tempfile.mkdtemp(prefix="fgr-")
    variables = os.environ | dict(environment) | {MARK: mark, "TMPDIR": scratch}
    num_killed = 0
    try:
        with log.open("ab") as sink:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                start_new_session=True, env=variables,
            )  # fmt: skip
        try:
            exit_status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            exit_status = None
        finally:
            num_killed = end_processes(process.pid, mark)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_SECONDS)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Ended(exit_status, time.monotonic() - started, num_killed)


def end_processes(session: int, mark: str) -> int:
    """Kill all processes of a session or with a mark, and wait for their end; returns how many."""
    killed: set[int] = set()
    deadline = time.monotonic() + _LAST_SECONDS
    while left := _members(session, mark):
        if time.monotonic() > deadline:
            break
        for process in left:
            with suppress(psutil.Error):
                process.kill()
                killed.add(process.pid)
        time.sleep(_POLL_SECONDS)
    return len(killed)


def _members(session: int, mark: str) -> list[psutil.Process]:
    """Running processes of a session, or with a mark among their environment variables."""
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getsid(process.pid) == session or process.environ().get(MARK) == mark:
                members.append(process)
    return members
