"""`flexgen-ray bench attention`: how near to the speed of memory host attention comes.

Decode attention does a few operations on each byte of the cache, so the most it can reach is the
speed at which the same threads read the same memory and do nothing else. Both are measured in
turn, since other work on the machine changes them. Where many query heads share a KV head, the
bound is the CPU's float32 arithmetic instead: one multiply-add for each element and query head,
at the rate of a loop that does nothing else. Measures; decides nothing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from flexgen_ray.models.host_kernel import Kernel

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (128, 64)
GROUPS = (1, 4, 8)
NUM_KV_HEADS = 8
ROUNDS = 5


def attention(
    threads: Annotated[int | None, typer.Option(help="All cores if not given.")] = None,
    context: Annotated[int, typer.Option(help="Tokens each sequence attends to.")] = 544,
    megabytes: Annotated[int, typer.Option(help="Size of the cache; beyond any CPU's own.")] = 512,
    seconds: Annotated[float, typer.Option(help="Time for each of the measurements.")] = 0.5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
) -> None:
    """Bytes of keys and values attended per second, against a plain read of the same memory.

    Ends with one line of JSON on stdout. Example: flexgen-ray bench attention --threads 8
    """
    import torch

    from flexgen_ray.models.host_kernel import KERNELS, load

    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    kernels = {name: load(name, threads) for name in KERNELS}
    memory = torch.empty(megabytes << 20, dtype=torch.uint8)
    _say(f"{'dtype':9}{'head_dim':>9}{'queries/KV':>11}{'read GB/s':>10}", *kernels, "of bound")
    results: list[dict] = []
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for group in GROUPS:
                shape = (NUM_KV_HEADS, context, head_dim)
                case = _case(memory, getattr(torch, dtype), shape, group)
                rates = _measure(case, kernels, seconds, threads)
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
    typed.fill_(0.5)
    per_row = 2 * kv_heads * seq * head_dim
    rows = typed.numel() // per_row
    if rows == 0:
        needed = per_row * dtype.itemsize >> 20
        raise ValueError(f"one sequence needs {needed} MB; raise --megabytes or lower --context")
    k, v = typed[: rows * per_row].view(2, rows, kv_heads, seq, head_dim)
    q = torch.randn(rows, kv_heads * group, head_dim).to(dtype)
    return q, k, v, torch.empty_like(q)


def _measure(
    case: tuple[Tensor, ...], kernels: dict[str, Kernel], seconds: float, threads: int
) -> dict[str, float]:
    """Bytes per second of the best plain read and of each kernel, and their fractions of it.

    bound_bytes_per_s is the read's or, if that is less, what the arithmetic allows. A fraction is
    the median over rounds: a shared machine's memory may change its speed between.
    """
    from flexgen_ray.bench.fma import fma_per_s
    from flexgen_ray.models.host_kernel import best_seconds

    q, k, v, out = case
    fmas = (k.numel() + v.numel()) * q.shape[1] // k.shape[1]
    lens = [k.shape[2]] * k.shape[0]
    nbytes = k.nbytes + v.nbytes
    runs: dict[str, Callable[[], object]] = {
        name: partial(kernel, q, k, v, lens, out) for name, kernel in kernels.items()
    }
    for run in runs.values():
        run()
    rounds = []
    for _ in range(ROUNDS):
        taken = {name: best_seconds(run, seconds / ROUNDS) for name, run in runs.items()}
        reads = [best_seconds(read, seconds / ROUNDS / 2) for read in _plain_reads(k, v)]
        peak = fma_per_s(threads, seconds / ROUNDS / 4)
        rounds.append(taken | {"read": min(reads), "arithmetic": fmas / peak})
    rates: dict[str, float] = {
        f"{name}_bytes_per_s": round(nbytes / min(taken[name] for taken in rounds))
        for name in ("read", *runs)
    }
    arithmetic = min(taken["arithmetic"] for taken in rounds)
    rates["fma_per_s"] = round(fmas / arithmetic)
    rates["bound_bytes_per_s"] = min(rates["read_bytes_per_s"], round(nbytes / arithmetic))
    for name in runs:
        of_read = [taken["read"] / taken[name] for taken in rounds]
        of_bound = [max(taken["read"], taken["arithmetic"]) / taken[name] for taken in rounds]
        rates |= {f"{name}_of_read": round(median(of_read), 3),
                  f"{name}_of_bound": round(median(of_bound), 3)}  # fmt: skip
    return rates


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
    _say(cells, *shown, f"{row['numba_of_bound']:.0%}")


def _say(first: str, *others: str) -> None:
    typer.echo(first + "".join(f"{other:>14}" for other in others), err=True)


def _finish(measured: dict, path: Path | None) -> None:
    from flexgen_ray.models.host_kernel import cpu_name

    made_by = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("flexgen-ray", "torch", "numba", "llvmlite")},
    }
    result = made_by | measured
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result))
