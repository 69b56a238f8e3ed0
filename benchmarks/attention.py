"""`python -m benchmarks.attention`: how near to the speed of memory host attention comes.

Decode attention does a few operations on each byte of the cache, so the most it can reach is the
speed at which the same threads read the same memory and do nothing else. Both are measured in
turns of milliseconds, since other work on the machine changes them. Where many query heads share
a KV head, the bound is the CPU's float32 arithmetic instead: one multiply-add for each element and
query head, at the rate of a loop that does nothing else. Packed caches and sparse attention take
part in the same turns, over as many tokens: what counts for them is how many rows are attended a
second, against the plain cache and all of its tokens. Measures; decides nothing.

How many float32 multiply-adds a second the CPU can do: the other bound of host attention.

Chains of them in registers, with nothing to load. Knows no attention.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.command import run_as_command
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import write_text
from flexgen_ray.reporting.terminal import display, say

if TYPE_CHECKING:
    from torch import Tensor

    from flexgen_ray.kernels.host_kernel import HostKernel
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flexgen_ray.kernels.host_kernel import best_seconds
from flexgen_ray.kernels.vectors import I32, LANES, constant, emit_loop, fma, splat

# Enough that none waits for its own last result; a register each.
_CHAINS = 12
_STEPS = 1_000_000

_intrinsic: Callable[[Callable], Any] = intrinsic


def fma_per_s(threads: int, seconds: float) -> float:
    """The most multiply-adds per second of so many threads together."""
    start = np.float32(0.5)
    _run_chains(1, start)
    with ThreadPoolExecutor(threads) as pool:

        def run() -> None:
            for future in [pool.submit(_run_chains, _STEPS, start) for _ in range(threads)]:
                future.result()

        return threads * _STEPS * _CHAINS * LANES / best_seconds(run, seconds)


@_intrinsic
def _chains(context, steps, x):
    """In each chain y = y * x + x, steps times; their sum, so that no chain is left out."""

    def generate(context, b: ir.IRBuilder, signature, args):
        steps, factor = args[0], splat(b, args[1])

        def step(_, carried):
            return [fma(b, x, factor, factor) for x in carried]

        first = [constant(float(i)) for i in range(_CHAINS)]
        total, *others = emit_loop(b, steps, 1, first, step)
        for other in others:
            total = b.fadd(total, other)
        return b.extract_element(total, I32(0))

    return types.float32(types.int64, types.float32), generate


@numba.njit(nogil=True)
def _run_chains(steps, x):
    return _chains(steps, x)


DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (128, 64)
GROUPS = (1, 4, 8)
NUM_KV_HEADS = 8
PATTERN = 8191
LEAST_TURNS = 5
FMA_SECONDS = 5e-3
SPIN_SECONDS = 20e-3  # torch's threads wait for more work on their cores that long, and longer


def attention(
    threads: Annotated[int | None, typer.Option(min=1, help="All cores if not given.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens each sequence attends to.")] = 544,
    megabytes: Annotated[int, typer.Option(min=1, help="MB of cache; beyond any CPU's own.")] = 512,
    seconds: Annotated[float, typer.Option(help="Time for each of the rows.")] = 4.0,
    bits: Annotated[
        list[int] | None, typer.Option(help="Also a cache packed into 4 or 8 bits; repeatable.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Also attend this share of the tokens only.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Bytes of keys and values attended per second, against a plain read of the same memory.

    Ends with one line of JSON on stdout. Example: python -m benchmarks.attention --threads 8
    """
    import torch

    from flexgen_ray.kernels.host_kernel import KERNELS, load_kernel
    from flexgen_ray.store.memory import allocate_pages

    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    kernels = {name: load_kernel(name, threads) for name in KERNELS}
    memory = allocate_pages(megabytes << 20)
    forms = _forms(bits or [], sparsity)
    headings = [*kernels, "of bound", *forms]
    _say(f"{'dtype':9}{'head_dim':>9}{'queries/KV':>11}{'read GB/s':>10}", *headings)
    results: list[dict] = []
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for group in GROUPS:
                shape = (NUM_KV_HEADS, context, head_dim)
                case = _case(memory, getattr(torch, dtype), shape, group)
                others = {
                    name: _attending(case, kernels["numba"], *form) for name, form in forms.items()
                }
                rates = _measure(case, kernels, others, seconds, threads)
                row = {"dtype": dtype, "head_dim": head_dim, "queries_per_kv_head": group}
                results.append(row | rates)
                _say_row(results[-1])
    peak = max(row["fma_per_s"] for row in results)
    made_with = {"threads": threads, "context": context, "fma_per_s": peak}
    _finish(made_with | {"results": results}, json_file)


def _case(
    memory: Tensor, dtype, shape: tuple[int, int, int], group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and out for as many rows as fit the memory; shape: a row's [kv_heads, seq, dim]."""
    import torch

    kv_heads, seq, head_dim = shape
    typed = memory.view(dtype)
    _repeat(_pattern(head_dim).to(dtype), typed)
    per_row = 2 * kv_heads * seq * head_dim
    rows = typed.numel() // per_row
    if rows == 0:
        needed = per_row * dtype.itemsize >> 20
        raise ValueError(f"one sequence needs {needed} MB; raise --megabytes or lower --context")
    k, v = typed[: rows * per_row].view(2, rows, kv_heads, seq, head_dim)
    q = torch.randn(rows, kv_heads * group, head_dim).to(dtype)
    return q, k, v, torch.empty_like(q)


def _pattern(head_dim: int) -> Tensor:
    """Vectors of so many values; more than a sequence's tokens, so that none weighs the same."""
    import torch

    return torch.randn(PATTERN, head_dim, generator=torch.Generator().manual_seed(0))


def _repeat(pattern: Tensor, into: Tensor) -> None:
    """Over all of a flat tensor."""
    pattern = pattern.flatten()
    for piece in into.split(len(pattern)):
        piece.copy_(pattern[: len(piece)])


def _forms(bits: list[int], sparsity: float | None) -> dict[str, tuple[int | None, float]]:
    """Bits and share of tokens, by name, of what is compared with the plain cache."""
    forms: dict[str, tuple[int | None, float]] = {f"int{it}": (it, 1.0) for it in bits}
    if sparsity is not None:
        forms |= {"sparse": (None, sparsity)}
        forms |= {f"int{it}_sparse": (it, sparsity) for it in bits}
    return forms


def _attending(
    case: tuple[Tensor, ...], kernel: HostKernel, bits: int | None, share: float
) -> tuple[int, Callable[[], object]]:
    """Bytes that attending the case's rows reads if they are packed, and by share; what does it."""
    import torch

    from flexgen_ray.config import kept_tokens
    from flexgen_ray.kernels.pack import pack
    from flexgen_ray.quant.packing import packed_bytes

    q, k, v, out = case
    context, head_dim = k.shape[2:]
    if bits is not None:
        shape = (2, *k.shape[:3], packed_bytes(head_dim, bits))
        cache = torch.empty(shape, dtype=torch.uint8)
        _repeat(pack(_pattern(head_dim), bits), cache.flatten())
        k, v = cache
    nbytes = k.nbytes + v.nbytes // context * kept_tokens(context, share)
    return nbytes, partial(kernel, q, k, v, [context] * len(k), out, share)


def _measure(
    case: tuple[Tensor, ...],
    kernels: dict[str, HostKernel],
    others: dict[str, tuple[int, Callable[[], object]]],
    seconds: float,
    threads: int,
) -> dict:
    """Bytes per second of a plain read and of each kernel, and the kernels' fractions of it.

    They take turns, a run each: a shared machine's memory changes its speed within seconds, and a
    fraction is to compare what met the same moment. All are medians over turns, and a fraction
    that of the turn's own read; of_bound: of the read or, where that is slower, of the arithmetic.
    """
    q, k, v, out = case
    fmas = (k.numel() + v.numel()) * q.shape[1] // k.shape[1]
    lens = [k.shape[2]] * k.shape[0]
    runs: dict[str, Callable[[], object]] = {
        name: partial(kernel, q, k, v, lens, out) for name, kernel in kernels.items()
    }
    every = runs | {name: run for name, (_, run) in others.items()}
    turns = _take_turns(every, _plain_reads(k, v), fmas, seconds, threads)
    middle = {name: median(turn[name] for turn in turns) for name in turns[0]}
    nbytes = k.nbytes + v.nbytes
    rates: dict = {f"{name}_bytes_per_s": round(nbytes / middle[name]) for name in ("read", *runs)}
    rates["turns"] = len(turns)
    rates["fma_per_s"] = round(fmas / middle["arithmetic"])
    rates["bound_bytes_per_s"] = round(nbytes / max(middle["read"], middle["arithmetic"]))
    for name in runs:
        of_read = [turn["read"] / turn[name] for turn in turns]
        of_bound = [max(turn["read"], turn["arithmetic"]) / turn[name] for turn in turns]
        rates |= {f"{name}_of_read": round(median(of_read), 3),
                  f"{name}_of_read_quartiles": _quartiles(of_read),
                  f"{name}_of_bound": round(median(of_bound), 3)}  # fmt: skip
    rates["numba_rows_per_s"] = round(len(q) / middle["numba"])
    for name, (read, _) in others.items():
        of_plain = [turn["numba"] / turn[name] for turn in turns]
        rates |= {f"{name}_rows_per_s": round(len(q) / middle[name]),
                  f"{name}_bytes_per_s": round(read / middle[name]),
                  f"{name}_of_plain_bytes": round(read / nbytes, 3),
                  f"{name}_of_plain_rows": round(median(of_plain), 3),
                  f"{name}_of_plain_rows_quartiles": _quartiles(of_plain)}  # fmt: skip
    return rates


def _take_turns(
    runs: dict[str, Callable[[], object]],
    reads: list[Callable[[], object]],
    fmas: int,
    seconds: float,
    threads: int,
) -> list[dict[str, float]]:
    """Seconds of each run, of the faster read and of so many multiply-adds, turn by turn."""

    for run in runs.values():
        run()
    turns, until = list[dict[str, float]](), time.perf_counter() + seconds
    while len(turns) < LEAST_TURNS or time.perf_counter() < until:
        taken = {name: _seconds(run) for name, run in reversed(runs.items())}
        read = min(map(_seconds, reads))
        turns.append(taken | {"read": read, "arithmetic": fmas / fma_per_s(threads, FMA_SECONDS)})
        time.sleep(SPIN_SECONDS)
    return turns


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _quartiles(values: list[float]) -> list[float]:
    return [round(it, 3) for it in quantiles(values, n=4)[::2]]


def _plain_reads(k: Tensor, v: Tensor) -> list[Callable[[], object]]:
    """The reductions that read fastest; which one is, depends on the machine."""
    import torch

    both = torch.as_strided(k, (k.numel() + v.numel(),), (1,))
    return [both.view(torch.int64).sum, both.view(torch.float32).max]


def _say_row(row: dict) -> None:
    cells = f"{row['dtype']:9}{row['head_dim']:9}{row['queries_per_kv_head']:11}"
    cells += f"{row['read_bytes_per_s'] / 1e9:10.1f}"
    names = [key.removesuffix("_of_read") for key in row if key.endswith("_of_read")]
    shown = [f"{row[f'{n}_bytes_per_s'] / 1e9:.1f} ({row[f'{n}_of_read']:.0%})" for n in names]
    others = [f"{value:.2f} x" for key, value in row.items() if key.endswith("_of_plain_rows")]
    _say(cells, *shown, f"{row['numba_of_bound']:.0%}", *others)


def _say(first: str, *others: str) -> None:
    say(first + "".join(f"{other:>14}" for other in others))


def _finish(measured: dict, path: Path | None) -> None:
    from flexgen_ray.kernels.host_kernel import cpu_name

    made_by = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("flexgen-ray", "torch", "numba", "llvmlite")},
    }
    result = made_by | measured
    if path is not None:
        write_text(path, to_json(result, indent=2) + "\n")
    display(to_json(result))


if __name__ == "__main__":
    run_as_command(attention)
