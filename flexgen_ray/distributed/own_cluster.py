"""A Ray cluster of this run's own: on the loopback interface, behind a token made for this run.

Has `ray.init` without its log lines too, and chooses the GPUs that such a cluster sees. Knows how
Ray is started and which sockets it listens on; not what runs there.

Ray's private names that are used here belong to the versions that pyproject.toml admits. Should a
version ignore them, `check_sockets` notices, because it inspects the sockets themselves.
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

OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum is 75 MiB; prompts and tokens need little
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray's nodes are on 127.0.0.1
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_MEMORY = "RAY_memory_usage_threshold"
_REMEDY = "use --no-use-ray, give the --address of a cluster, or install another version of Ray"


class InsecureCluster(RuntimeError):
    """The cluster listens where other machines could reach it, or asks for no token."""


class OwnCluster:
    """Ray cluster of this process, until the `close` of its last user, which removes its token.

    Environment variables are changed only while Ray starts.
    options: further arguments of `ray.init`.
    Raises InsecureCluster, with the cluster stopped, if it listens beyond the loopback interface.
    """

    _running: ClassVar[weakref.ref[OwnCluster] | None] = None  # a process has one Ray at most

    @classmethod
    def running(cls) -> OwnCluster | None:
        """This process's cluster for one more user, who also has to close it; None without one."""
        cluster = cls._running and cls._running()
        if not cluster or not cluster._users:
            return None
        if ray.get_runtime_context().gcs_address != cluster.address:
            return None
        cluster._users += 1
        return cluster

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
        """Raise InsecureCluster if Ray listens where other machines can reach it."""
        exposed = sorted(it for it in self.sockets() if not is_loopback(it[0]))
        if exposed:
            where = ", ".join(f"{address}:{port} ({name})" for address, port, name in exposed)
            raise InsecureCluster(
                f"Ray {ray.__version__} listens on {where}, which other machines can reach; "
                f"{_REMEDY}"
            )

    def close(self) -> None:
        """Count one user less; the last one stops Ray and removes the token."""
        self._users -= 1
        if self._users:
            return
        if ray.is_initialized():
            ray.shutdown()
        # Make this process forget the token, so that it can connect to other clusters.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        self._remove_token()


def initialize(**options: Any) -> str:
    """Call ray.init without its log lines; returns the cluster's address.

    The caller's handler of SIGTERM stays in place. options: arguments of `ray.init`.
    Raises Stopped if SIGTERM comes meanwhile.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        context: Any = ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except SystemExit as error:  # by Ray's own handler of SIGTERM, which ray.init installs
        raise Stopped from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    return context.address_info["address"]


@contextmanager
def only_gpu(device: str, address: str | None) -> Iterator[str]:
    """Context in which a Ray cluster that is started sees only the GPU of this device.

    device: auto, cpu, cuda or cuda:N. address: the user's address of a cluster, or None.
    Yields the device that stages should ask for, without its number.
    Raises ValueError for cuda:N on a cluster that runs already, where Ray assigns the GPUs.
    """
    kind, _, number = device.partition(":")
    if not number:
        yield device
        return
    if ray.is_initialized() or address or os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"device is {device!r}, but on a cluster that runs already Ray gives each stage a GPU; "
            f"use device='cuda', or start that node's Ray with {_VISIBLE_GPUS}={number}"
        )
    before = os.environ.get(_VISIBLE_GPUS)
    os.environ[_VISIBLE_GPUS] = visible_gpu(before, int(number))
    try:
        yield kind
    finally:
        del os.environ[_VISIBLE_GPUS]
        if before is not None:
            os.environ[_VISIBLE_GPUS] = before


def visible_gpu(visible: str | None, number: int) -> str:
    """Name of a GPU, for CUDA_VISIBLE_DEVICES, by its number from 0 among the visible ones.

    visible: the variable's present value; None if it is unset and all GPUs are visible.
    Raises ValueError if there are not that many.
    """
    if visible is None:
        return str(number)
    names = [name for name in visible.split(",") if name]
    if number >= len(names):
        raise ValueError(
            f"device is 'cuda:{number}', but {_VISIBLE_GPUS} is {visible!r}: {len(names)} GPUs, "
            "counted from 0"
        )
    return names[number]


def is_loopback(address: str) -> bool:
    """True if only this machine can reach a socket that listens on this IP address."""
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


def _start(**options: Any) -> str:
    """Start Ray; returns its address. Raises RuntimeError if Ray gives up within its own limit."""
    try:
        return initialize(address="local", include_dashboard=False, **options)
    except Exception as error:
        raise RuntimeError(
            f"Ray did not start on this machine ({error}); try again when it is less busy, or use "
            "--no-use-ray"
        ) from error


@contextmanager
def _environment(token: Path) -> Iterator[None]:
    """Set Ray's environment variables, and restore the old ones afterwards.

    Ray's processes inherit them. This process's Ray read some of them when it was imported, so its
    constant and its cache are changed as well.
    """
    variables: dict[str, str | None] = {
        _MODE: None,  # Ray then sets it to "token", and refreshes its cached value
        _TOKEN: None,
        _TOKEN_PATH: str(token),
        LOOPBACK_ONLY: "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A policy may fill the host's memory on purpose; Ray's memory monitor would end the run.
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
    """Set environment variables; None removes one."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _write_token(path: Path) -> None:
    """Write a new token to a file that only its owner can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
