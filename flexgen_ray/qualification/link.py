"""Questions of the probe about the CPU-GPU link: pieces, directions, overtaking, 2-D copies.

Host memory is registered as in a run. Knows copies; not what is copied.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_ray.qualification.setting import Skipped
from flexgen_ray.qualification.timing import timed, wait
from flexgen_ray.store.memory import MemoryTier

_TO_DEVICE, _TO_HOST = "to the device", "to the host"
_KINDS = {_TO_DEVICE: 1, _TO_HOST: 2}  # of cudaMemcpyKind
_TOKENS, _TOKEN_BYTES = 544, 256  # of a row of a head's keys: 128 float16 values each


@dataclass(frozen=True)
class _Sizes:
    """Sizes of buffers and copies, by their unit in bytes; lines: rows of a 2-D copy."""

    unit: int = 2**20
    lines: int = 24 * 56  # 24 rows of OPT-30B's 56 heads

    @property
    def buffer(self) -> int:
        """Bytes of each of both buffers."""
        return 1024 * self.unit

    @property
    def large(self) -> int:
        """Bytes of a copy that others wait for."""
        return 512 * self.unit

    def pieces(self, *counts: int) -> list[int]:
        """Bytes of pieces of so many units."""
        return [count * self.unit for count in counts]


_FULL, _TINY = _Sizes(), _Sizes(2**12, 4)


def _sizes(is_tiny: bool) -> _Sizes:
    return _TINY if is_tiny else _FULL


@contextmanager
def _buffers(device: torch.device, nbytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Buffers of uint8 on the host, registered with CUDA, and on the device."""
    tier = MemoryTier("cpu", nbytes, torch.device("cpu"), pinned=device.type == "cuda")
    try:
        host = tier.allocate("a measurement", nbytes)
        yield host, torch.zeros(nbytes, dtype=torch.uint8, device=device)
    finally:
        tier.close()


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _ends(direction: str, host: Tensor, on_device: Tensor) -> tuple[Tensor, Tensor]:
    """Target and source of a copy in a direction."""
    return (on_device, host) if direction == _TO_DEVICE else (host, on_device)


def one_direction(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Rate of copies of several sizes, each after the other, in each direction."""
    sizes = _sizes(is_tiny)
    started = time.perf_counter()
    with _buffers(device, sizes.buffer) as buffers:
        wait(device)
        seconds = time.perf_counter() - started
        pinned = _is_pinned(buffers[0])
        yield {"allocated_s": round(seconds, 3), "bytes": sizes.buffer, "pinned": pinned}
        for size in sizes.pieces(1, 8, 16, 32, 256):
            for direction in _KINDS:
                target, source = _ends(direction, *buffers)
                done = timed(device, partial(_copy, target[:size], source[:size]))
                yield {
                    "direction": direction,
                    "piece_bytes": size,
                    "gb_per_s": done.gb_per_s(size),
                    "issue_us": done.issue_us,
                }


def _is_pinned(host: Tensor) -> bool:
    """True if CUDA knows the memory as its own; False without a GPU."""
    return torch.cuda.is_available() and host.is_pinned()


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("needs a CUDA device")


def both_directions(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Rate of both directions together, by the size of the pieces, on a stream each."""
    _needs_cuda(device)
    sizes = _sizes(is_tiny)
    with _buffers(device, sizes.buffer) as (host, on_device):
        for size in sizes.pieces(8, 32, 256):
            hosts, targets = host.split(size), on_device.split(size)
            middle = len(hosts) // 2
            up = zip(targets[:middle], hosts[:middle], strict=True)
            down = zip(hosts[middle:], targets[middle:], strict=True)
            streams = [torch.cuda.Stream(device) for _ in range(2)]
            wait(device)
            started = time.perf_counter()
            for number, pair in enumerate(chain.from_iterable(zip(up, down, strict=True))):
                with torch.cuda.stream(streams[number % 2]):
                    _copy(*pair)
            wait(device)
            rate = sizes.buffer / 2 / (time.perf_counter() - started) / 1e9
            yield {"piece_bytes": size, "gb_per_s_each": round(rate, 2)}


def overtaking(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds that a small copy takes behind a large one on another stream, cut in pieces.

    If the link serves copies in their order, the small one waits for all that was issued before.
    """
    _needs_cuda(device)
    sizes = _sizes(is_tiny)
    with _buffers(device, sizes.buffer) as buffers:
        for direction in _KINDS:
            ends = _ends(direction, *buffers)
            for cut in sizes.pieces(512, 32, 16, 8):
                large = [end[: sizes.large].split(cut) for end in ends]
                small = [end[sizes.large :][: sizes.unit] for end in ends]
                yield {
                    "direction": direction,
                    "cut_bytes": cut,
                    "small_alone_ms": _small_copy_ms(device, small, [(), ()]),
                    "small_behind_ms": _small_copy_ms(device, small, large),
                }


def _small_copy_ms(device: torch.device, small: Sequence[Tensor], large: Sequence) -> float:
    """Milliseconds of a small copy on one stream, just after a large one began on another.

    small: target and source. large: pieces of a target and of a source.
    """
    first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait(device)
    with torch.cuda.stream(first):
        for target, source in zip(*large, strict=True):
            _copy(target, source)
    with torch.cuda.stream(second):
        begin.record()
        _copy(*small)
        end.record()
    wait(device)
    return round(begin.elapsed_time(end), 4)


def two_dimensional(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Rate of cudaMemcpy2DAsync, which copies only the used tokens of each row of a cache."""
    _needs_cuda(device)
    copy, lines = _memcpy_2d(), _sizes(is_tiny).lines
    with _buffers(device, lines * _TOKENS * _TOKEN_BYTES) as buffers:
        for direction, kind in _KINDS.items():
            addresses = [end.data_ptr() for end in _ends(direction, *buffers)]
            for past in (100, 300, 500):
                width = past * _TOKEN_BYTES
                done = timed(device, partial(_copy_lines, copy, addresses, width, lines, kind))
                yield {
                    "direction": direction,
                    "tokens_of_544": past,
                    "gb_per_s": done.gb_per_s(width * lines),
                    "issue_us": done.issue_us,
                }


def _copy_lines(copy: Any, addresses: Sequence[int], width: int, lines: int, kind: int) -> None:
    """Copy the first `width` bytes of every row; addresses: of the target and of the source."""
    target, source = addresses
    pitch = _TOKENS * _TOKEN_BYTES
    stream = torch.cuda.current_stream().cuda_stream
    status = copy(target, pitch, source, pitch, width, lines, kind, stream)
    if status:
        raise RuntimeError(f"cudaMemcpy2DAsync returned error {status}")


def _memcpy_2d() -> Any:
    """The function of the CUDA runtime that torch has loaded."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split()[-1] for line in lines if "libcudart" in line}
    if not paths:
        raise Skipped("torch has the CUDA runtime within its own library")
    function = ctypes.CDLL(min(paths)).cudaMemcpy2DAsync
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    function.restype = ctypes.c_int
    return function
