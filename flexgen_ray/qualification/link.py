"""Questions of the probe about the CPU-GPU link: pieces, directions, overtaking, 2-D copies.

Host memory is registered as in a run. Knows copies; not what is copied.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_ray.qualification.setting import Skipped
from flexgen_ray.qualification.timing import timed, wait
from flexgen_ray.store.memory import MemoryTier

_MIB = 2**20
_BUFFER, _TINY_BUFFER = 1024 * _MIB, 4 * _MIB
_PIECES = (1, 8, 16, 32, 256)  # MiB of one copy
_LARGE, _SMALL = 512 * _MIB, _MIB
_CUTS = (512, 32, 16, 8)  # MiB of the pieces of a large copy
_TO_DEVICE, _TO_HOST = "to the device", "to the host"
# Keys of one layer of OPT-30B: 24 rows of 56 heads, 544 tokens of 128 float16 values each.
_LINES, _TOKENS, _TOKEN_BYTES = 24 * 56, 544, 256
_KINDS = {_TO_DEVICE: 1, _TO_HOST: 2}  # of cudaMemcpyKind


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


def one_direction(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Rate of copies of several sizes, each after the other, in each direction."""
    nbytes = _TINY_BUFFER if is_tiny else _BUFFER
    started = time.perf_counter()
    with _buffers(device, nbytes) as (host, on_device):
        wait(device)
        seconds = time.perf_counter() - started
        yield {"allocated_s": round(seconds, 3), "bytes": nbytes, "pinned": _is_pinned(host)}
        for size in [1] if is_tiny else _PIECES:
            part = slice(size * _MIB)
            ends = {_TO_DEVICE: (on_device, host), _TO_HOST: (host, on_device)}
            for direction, (target, source) in ends.items():
                done = timed(device, partial(_copy, target[part], source[part]))
                yield {
                    "direction": direction,
                    "piece_mib": size,
                    "gb_per_s": done.gb_per_s(size * _MIB),
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
    with _buffers(device, _BUFFER) as (host, on_device):
        for size in (8, 32, 256):
            sources, targets = (end.split(size * _MIB) for end in (host, on_device))
            middle = len(sources) // 2
            up = zip(targets[:middle], sources[:middle], strict=True)
            down = zip(sources[middle:], targets[middle:], strict=True)
            streams = [torch.cuda.Stream(device) for _ in range(2)]
            wait(device)
            started = time.perf_counter()
            for number, pair in enumerate(chain.from_iterable(zip(up, down, strict=True))):
                with torch.cuda.stream(streams[number % 2]):
                    _copy(*pair)
            wait(device)
            rate = _BUFFER / 2 / (time.perf_counter() - started) / 1e9
            yield {"piece_mib": size, "gb_per_s_each": round(rate, 2)}


def overtaking(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds that a small copy takes behind a large one on another stream, cut in pieces.

    If the link serves copies in their order, the small one waits for all that was issued before.
    """
    _needs_cuda(device)
    with _buffers(device, _BUFFER) as (host, on_device):
        for direction in _KINDS:
            ends = (on_device, host) if direction == _TO_DEVICE else (host, on_device)
            for cut in _CUTS:
                alone, behind = (_small_copy_ms(device, *ends, cut, large) for large in (0, _LARGE))
                yield {
                    "direction": direction,
                    "cut_mib": cut,
                    "small_alone_ms": alone,
                    "small_behind_ms": behind,
                }


def _small_copy_ms(
    device: torch.device, target: Tensor, source: Tensor, cut: int, large: int
) -> float:
    """Milliseconds of a small copy on one stream, just after a large one began on another."""
    first, second = torch.cuda.Stream(device), torch.cuda.Stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait(device)
    with torch.cuda.stream(first):
        for start in range(0, large, cut * _MIB):
            part = slice(start, min(start + cut * _MIB, large))
            _copy(target[part], source[part])
    with torch.cuda.stream(second):
        begin.record()
        part = slice(_LARGE, _LARGE + _SMALL)
        _copy(target[part], source[part])
        end.record()
    wait(device)
    return round(begin.elapsed_time(end), 4)


def two_dimensional(device: torch.device, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Rate of cudaMemcpy2DAsync, which copies only the used tokens of each row of a cache."""
    _needs_cuda(device)
    copy = _memcpy_2d()
    with _buffers(device, _LINES * _TOKENS * _TOKEN_BYTES) as (host, on_device):
        for direction in _KINDS:
            ends = (on_device, host) if direction == _TO_DEVICE else (host, on_device)
            for past in (100, 300, 500):
                width, pitch = past * _TOKEN_BYTES, _TOKENS * _TOKEN_BYTES
                action = partial(_copy_lines, copy, ends, pitch, width, _KINDS[direction])
                done = timed(device, action)
                yield {
                    "direction": direction,
                    "tokens_of_544": past,
                    "gb_per_s": done.gb_per_s(width * _LINES),
                    "issue_us": done.issue_us,
                }


def _copy_lines(copy: Any, ends: tuple[Tensor, Tensor], pitch: int, width: int, kind: int) -> None:
    """Copy the first `width` bytes of every `pitch` bytes; ends: the target and the source."""
    target, source = (end.data_ptr() for end in ends)
    stream = torch.cuda.current_stream().cuda_stream
    status = copy(target, pitch, source, pitch, width, _LINES, kind, stream)
    if status:
        raise RuntimeError(f"cudaMemcpy2DAsync returned error {status}")


def _memcpy_2d() -> Any:
    """The function of the CUDA runtime that torch has loaded."""
    torch.cuda.current_stream()
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split()[-1] for line in lines if "libcudart" in line}
    if not paths:
        raise Skipped("torch has the CUDA runtime within its own library")
    function = ctypes.CDLL(min(paths)).cudaMemcpy2DAsync
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    function.restype = ctypes.c_int
    return function
