"""A Ray cluster of this run's own: on the loopback interface, behind a token made for this run.

Knows how Ray is started, and which sockets it listens on; not what runs there. Ray's private names
that are used here are those of the versions that pyproject.toml admits; `check_sockets` looks at
the sockets themselves, so that a Ray which ignores them is stopped.

ray.init without its log lines, and with the caller's answer to SIGTERM left in place.

The GPUs that a run's own Ray cluster sees: all of this machine's, or the one of `cuda:N`.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from flexgen_ray.signals import Stopped

_VARIABLE = "CUDA_VISIBLE_DEVICES"


@contextmanager
def only_gpu(device: str, address: str | None) -> Iterator[str]:
    """Yields the device to ask a Driver for; a Ray that is started meanwhile sees only that GPU.

    Raises ValueError for cuda:N on a cluster that is there already, where Ray gives out the GPUs.
    """
    kind, _, number = device.partition(":")
    if not number:
        yield device
        return
    if ray.is_initialized() or address or os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"device is {device!r}, but on a cluster that runs already Ray gives each stage a GPU; "
            f"use device='cuda', or start that node's Ray with {_VARIABLE}={number}"
        )
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = visible_gpu(before, int(number))
    try:
        yield kind
    finally:
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before


def visible_gpu(before: str | None, number: int) -> str:
    """The GPU of that number, from 0, that CUDA_VISIBLE_DEVICES leaves, or ValueError."""
    if before is None:
        return str(number)
    visible = [name for name in before.split(",") if name]
    if number >= len(visible):
        raise ValueError(
            f"device is 'cuda:{number}', but {_VARIABLE} is {before!r}: {len(visible)} GPUs, "
            "counted from 0"
        )
    return visible[number]


def initialize(**options: Any) -> str:
    """Calls ray.init with these options; returns the cluster's address.

    Raises Stopped if SIGTERM comes meanwhile.
    """
    answer = signal.getsignal(signal.SIGTERM)
    try:
        context: Any = ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except SystemExit as error:  # Ray's own answer to SIGTERM, which its start puts in place
        raise Stopped from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, answer)
    return context.address_info["address"]


OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB; prompts and tokens need little
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray's nodes are on 127.0.0.1
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_MEMORY = "RAY_memory_usage_threshold"
_REMEDY = "use --no-use-ray, give the --address of a cluster, or install another version of Ray"


class InsecureCluster(RuntimeError):
    """The cluster listens where other machines could reach it, or asks for no token."""


class OwnCluster:
    """A cluster that is there until its last user's `close`, which leaves no token behind.

    The environment is changed only while Ray starts. Raises OpenToOthers, with the cluster stopped,
    if it listens beyond the loopback interface.
    """

    _running: ClassVar[weakref.ref[OwnCluster] | None] = None  # a process has one Ray

    @classmethod
    def running(cls) -> OwnCluster | None:
        """The one that this process has, for another user, who closes it too; or None."""
        found = cls._running and cls._running()
        if not found or not found._users or ray.get_runtime_context().gcs_address != found.address:
            return None
        found._users += 1
        return found

    def __init__(self, **options: Any) -> None:
        folder = Path(tempfile.mkdtemp(prefix="flexgen-ray-"))  # mode 0700
        self._remove_token = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._others = {it.pid for it in psutil.Process().children(recursive=True)}
        self._other_sockets = set(listening([psutil.Process()]))
        self.address = ""
        self._users = 1
        try:
            _write_token(folder / "token")
            with _environment(folder / "token"):
                self.address = _start(object_store_memory=OBJECT_STORE_BYTES, **options)
                if os.environ.get(_MODE) != "token":
                    raise InsecureCluster(f"Ray {ray.__version__} asks for no token; {_REMEDY}")
            self.check_sockets()
        except BaseException:
            self.close()
            raise
        OwnCluster._running = weakref.ref(self)

    def sockets(self) -> set[tuple[str, int, str]]:
        """(address, port, process name) of each socket that Ray's processes here listen on."""
        here = psutil.Process()
        children = here.children(recursive=True)
        own = listening([here, *(it for it in children if it.pid not in self._others)])
        return set(own) - self._other_sockets

    def check_sockets(self) -> None:
        """Raises OpenToOthers if Ray listens where other machines can reach it."""
        wide = sorted(it for it in self.sockets() if not is_loopback(it[0]))
        if wide:
            where = ", ".join(f"{address}:{port} ({name})" for address, port, name in wide)
            raise InsecureCluster(
                f"Ray {ray.__version__} listens on {where}, which other machines can reach; "
                f"{_REMEDY}"
            )

    def close(self) -> None:
        """Stops Ray with its last user, removes the token, and lets this process forget it."""
        self._users -= 1
        if self._users:
            return
        if ray.is_initialized():
            ray.shutdown()
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        self._remove_token()


def _start(**options: Any) -> str:
    """Starts Ray and returns its address; RuntimeError if it can't be had in Ray's own time."""
    try:
        return initialize(address="local", include_dashboard=False, **options)
    except Exception as error:
        raise RuntimeError(
            f"Ray did not start on this machine ({error}); try again when it is less busy, or use "
            "--no-use-ray"
        ) from error


def is_loopback(address: str) -> bool:
    """True if only this machine can reach what listens on this IP address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def listening(processes: Iterable[psutil.Process]) -> Iterator[tuple[str, int, str]]:
    """(address, port, process name) of each TCP socket on which these processes listen."""
    for process in processes:
        # A process may have ended since it was listed.
        with suppress(psutil.Error):
            name = process.name()
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    yield connection.laddr.ip, connection.laddr.port, name


@contextmanager
def _environment(token: Path) -> Iterator[None]:
    """Set Ray's environment variables, and put the old ones back afterwards.

    Ray's processes inherit them; so does this process's Ray, which read some when imported.
    """
    variables: dict[str, str | None] = {
        _MODE: None,  # Ray then sets it to token, and refreshes what this process knows of it
        _TOKEN: None,
        _TOKEN_PATH: str(token),
        LOOPBACK_ONLY: "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A policy may fill the host's memory on purpose; Ray's own killer would end the run.
        _MEMORY: os.environ.get(_MEMORY, "0.99"),
    }
    before = {name: os.environ.get(name) for name in variables}
    is_cluster = ray_constants.ENABLE_RAY_CLUSTER
    try:
        _set(variables)
        ray_constants.ENABLE_RAY_CLUSTER = False
        AuthenticationTokenLoader.instance().reset_cache()
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = is_cluster
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    """Sets environment variables; None removes one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _write_token(path: Path) -> None:
    """A new token, in a file that its owner alone can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
