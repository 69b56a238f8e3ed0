"""Choice of the kernel for attention on the host: the faster on this machine, measured once.

The kernels round differently, so a machine remembers its choice, and with it its bits, from run to
run. Knows how to time a kernel; not how one works.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flexgen_ray import package_versions
from flexgen_ray.config import PAGE_TOKENS
from flexgen_ray.kernels import attention
from flexgen_ray.kernels.pack import unpack
from flexgen_ray.quant.packing import packed_bytes


class HostKernel(Protocol):
    """Kernel that attends on the host; arguments as for HostAttention."""

    def __call__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        lens: list[int],
        out: Tensor,
        sparsity: float = 1.0,
        window: int | None = None,
        lse: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> None: ...


KERNELS = ("sdpa", "numba")
_FILE = "host-attention.json"
_CONTEXT = 544
MEASURED_BYTES = 128 << 20
_SECONDS_EACH = 0.1
_LEAST_HEAD_DIM = 16


@dataclass(frozen=True)
class AttentionShape:
    """Shape of attention that a kernel's speed depends on.

    dtype: torch's name; bits: 4 or 8 for a quantized cache; sparsity: share of attended tokens.
    """

    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bits: int | None = None
    sparsity: float = 1.0

    def vector_bytes(self) -> int:
        """Bytes of one token's key or value of one KV head."""
        if self.bits is not None:
            return packed_bytes(self.head_dim, self.bits)
        return self.head_dim * getattr(torch, self.dtype).itemsize


def load_kernel(name: str, threads: int) -> HostKernel:
    """Kernel with a name of KERNELS; each takes plain and quantized caches, and any sparsity.

    threads: for numba; sdpa runs on the number of threads that torch is set to.
    Raises ValueError for another name.
    """
    if name == "sdpa":
        return _sdpa
    if name == "numba":
        from flexgen_ray.kernels.host_attention import HostAttention

        return HostAttention(threads)
    raise ValueError(f"there is no host attention kernel {name!r}; there are {KERNELS}")


def rows_together(kernel: HostKernel, count: int, most: int) -> Iterator[slice]:
    """Yield the rows that a call of the kernel attends: all of `count`, or `most` at a time.

    most: for a kernel that copies pages side by side, which takes memory; others read pages where
    they lie.
    """
    step = most if kernel is _sdpa else max(count, 1)
    for at in range(0, count, step):
        yield slice(at, min(at + step, count))


def takes_torch_threads(kernel: HostKernel) -> bool:
    """True if the kernel runs on torch's threads, rather than on its own."""
    return kernel is _sdpa


def choose_kernel(
    shape: AttentionShape, threads: int, folder: Path, nbytes: int = MEASURED_BYTES
) -> str:
    """Name of the faster kernel; measured (about half a second) unless the folder has the answer.

    folder: created if need be; nbytes: as for `measure`. A file that can't be read is ignored, and
    one that can't be written is left out; neither is an error.
    """
    if shape.head_dim < _LEAST_HEAD_DIM:
        return "sdpa"
    path, key = folder / _FILE, _key(shape, threads)
    choices = _read(path)
    if choices.get(key) in KERNELS:
        return choices[key]
    seconds = measure(shape, threads, min(nbytes, MEASURED_BYTES))
    chosen = min(seconds, key=seconds.__getitem__)
    with suppress(OSError):
        _write(path, _read(path) | {key: chosen})
    return chosen


def measure(shape: AttentionShape, threads: int, nbytes: int = MEASURED_BYTES) -> dict[str, float]:
    """Seconds that each kernel takes to attend a cache once, by the kernel's name.

    nbytes: most bytes of the cache, and of what torch's kernel gathers and dequantizes of it. The
    default size is far more than a CPU's caches hold.
    """
    vector_bytes = 2 * shape.vector_bytes()
    if shape.bits is not None:
        vector_bytes += replace(shape, bits=None).vector_bytes()
    row_bytes = 2 * shape.num_kv_heads * _CONTEXT * vector_bytes
    seconds = {}
    for name in KERNELS:
        kernel = compiled_kernel(name, threads, shape)
        run = _call(kernel, shape, max(1, nbytes // row_bytes), _CONTEXT)
        seconds[name] = best_seconds(run, _SECONDS_EACH)
    return seconds


def compiled_kernel(name: str, threads: int, shape: AttentionShape) -> HostKernel:
    """Kernel with a name of KERNELS that has run once for the shape, and so is compiled."""
    kernel = load_kernel(name, threads)
    _call(kernel, shape, 1, 1)()
    return kernel


def _call(
    kernel: HostKernel, shape: AttentionShape, rows: int, context: int
) -> Callable[[], object]:
    """Call of the kernel on a number of rows of made-up values; a row's pages are neighbours."""
    dtype = getattr(torch, shape.dtype)
    tables = torch.arange(rows * -(-context // PAGE_TOKENS), dtype=torch.int32).view(rows, -1)
    size = (2, tables.numel(), shape.num_kv_heads, PAGE_TOKENS, shape.vector_bytes())
    # These bytes are small numbers in every dtype, and as minimums and scales.
    cache = torch.full(size, 0x38, dtype=torch.uint8)
    if shape.bits is None:
        cache = cache.view(dtype)
    q = torch.ones((rows, shape.num_heads, shape.head_dim), dtype=dtype)
    out = torch.empty_like(q)
    return partial(kernel, q, cache[0], cache[1], tables, [context] * rows, out, shape.sparsity)


def best_seconds(run: Callable[[], object], budget: float) -> float:
    """Seconds of the fastest run, of at least two and of as many as fit the budget in seconds."""
    best, begin, runs = float("inf"), time.perf_counter(), 0
    while runs < 2 or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        run()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def _sdpa(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lens: list[int],
    out: Tensor,
    sparsity: float = 1.0,
    window: int | None = None,
    lse: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attend with torch's scaled_dot_product_attention, once pages are gathered and dequantized."""
    bits, tokens = attention.cache_bits(keys, q.shape[-1]), attention.span(lens, window)
    mask = attention.length_mask(lens, q.device, window)
    k, v = (attention.gather_pages(plane, tables, tokens) for plane in (keys, values))
    for cached in (k, v):
        attention.clear_unattended(cached, mask)
    lens = [end - tokens.start for end in lens]
    if bits is not None:
        k, v = (_dequantized(x, bits, q) for x in (k, v))
    if sparsity != 1:
        out.copy_(attention.decode_sparse(q, k, v, lens, sparsity, mask, window, lse, sinks))
        return
    # Results may replace the queries, so they come last.
    needs_sums = lse is not None or sinks is not None
    sums = attention.log_sum_exp(q, k, mask) if needs_sums else None
    attended = attention.decode(q, k, v, lens, mask, window)
    if sums is not None:
        if sinks is not None:
            attention.add_sinks(attended, sums, sinks)
        if lse is not None:
            lse.copy_(sums)
    out.copy_(attended)


def _dequantized(packed: Tensor, bits: int, like: Tensor) -> Tensor:
    values = like.new_empty((*packed.shape[:-1], like.shape[-1]))
    unpack(packed, bits, values)
    return values


def _key(shape: AttentionShape, threads: int) -> str:
    """Key of a choice: everything that the kernels' speed depends on."""
    heads = f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}"
    if shape.bits is not None:
        heads += f" in {shape.bits} bits"
    if shape.sparsity != 1:
        heads += f" of {shape.sparsity:g} of the tokens"
    versions = " ".join(map(" ".join, package_versions("torch", "numba", "flexgen-ray").items()))
    return f"{cpu_name()}, {shape.dtype}, {heads}, {threads} threads, {versions}"


def cpu_name() -> str:
    """CPU model and, in brackets, LLVM's name for the CPU that code is compiled for."""
    from llvmlite import binding

    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({binding.get_host_cpu_name()})"
    return f"{platform.machine()} ({binding.get_host_cpu_name()})"


def _read(path: Path) -> dict[str, str]:
    """Choices of earlier runs, by _key; none if the file can't be read."""
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return choices if isinstance(choices, dict) else {}


def _write(path: Path, choices: dict[str, str]) -> None:
    """Replace the file in one step, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, written = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(choices, indent=2, sort_keys=True) + "\n")
        os.replace(written, path)
    except BaseException:
        Path(written).unlink(missing_ok=True)
        raise
