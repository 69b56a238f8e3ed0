"""Is attention on the CPU as fast as its memory? Kernels against a plain read, in turns.

Claim: host attention reaches most of the machine's limit. Decode attention does a few operations
on each byte of the cache, so its limit is the speed at which the same threads read the same memory
and do nothing else. Where many query heads share a KV head, the limit is float32 arithmetic
instead: one multiply-add for each element and query head (fma_rate.py). Kernels and limits take
turns of milliseconds, since other work on the machine changes them. Quantized caches and sparse
attention take part in the same turns, over as many tokens; rows attended per second count for
them, against the unquantized cache and all of its tokens.

Good: `numba_of_bound` near 1, and `int4_of_plain_rows`, `sparse_of_plain_rows` above 1.
docs/results/host-attention-cpu.json: python -m benchmarks.attention --json FILE
docs/results/host-attention-packed-cpu.json: python -m benchmarks.attention --bits 4 --bits 8
--sparsity 0.1 --seconds 3 --json FILE
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.command import run_as_command
from benchmarks.fma_rate import fma_per_s
from flexgen_ray import package_versions
from flexgen_ray.cli.options import JsonOption
from flexgen_ray.files.json_text import to_json
from flexgen_ray.files.output_files import write_text
from flexgen_ray.reporting.terminal import display, say

if TYPE_CHECKING:
    from torch import Tensor

    from flexgen_ray.kernels.host_kernel import HostKernel

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (128, 64)
GROUPS = (1, 4, 8)
NUM_KV_HEADS = 8
PATTERN = 8191  # different vectors that fill the cache, more than a sequence has tokens
MIN_TURNS = 5
FMA_SECONDS = 5e-3
SPIN_SECONDS = 20e-3  # torch's threads spin on their cores for at least this long after a product


def attention(
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads of every kernel. [default: all cores]"),
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens that each sequence attends.")
    ] = 544,
    megabytes: Annotated[
        int, typer.Option(metavar="MB", min=1, help="KV cache, larger than the CPU's own caches.")
    ] = 512,
    seconds: Annotated[
        float, typer.Option(help="Time for each row of the table: dtype, head_dim and group.")
    ] = 4.0,
    bits: Annotated[
        list[int] | None,
        typer.Option(
            metavar="4|8",
            help="Measure a cache quantized to 4 or 8 bits too; may be given twice. "
            "[default: none]",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Measure sparse attention of this share of the tokens too. [default: none]",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure bytes of keys and values attended per second, against a plain read of the memory.

    Example: python -m benchmarks.attention --threads 8
    """
    import torch

    from flexgen_ray.calibration.steady import OtherLoad
    from flexgen_ray.cli.bench.runs import beside
    from flexgen_ray.kernels.host_kernel import KERNELS, load_kernel
    from flexgen_ray.store.memory import allocate_mapping

    watch = OtherLoad()
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    kernels = {name: load_kernel(name, threads) for name in KERNELS}
    memory = allocate_mapping(megabytes << 20)
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
    _finish(made_with | beside(watch) | {"results": results}, json_file)


@dataclass(frozen=True)
class _Case:
    """Arguments of a kernel: rows of equal length, and a cache where a row's pages are neighbours.

    context: tokens of each row.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    context: int

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' keys and values."""
        places = self.tables.shape[1] * self.keys.shape[2]
        return (self.keys.nbytes + self.values.nbytes) // places * self.context

    def attending(self, kernel: HostKernel, share: float = 1.0) -> Callable[[], object]:
        """Call of a kernel that attends a share of the tokens."""
        import torch

        lens, out = [self.context] * len(self.q), torch.empty_like(self.q)
        return partial(kernel, self.q, self.keys, self.values, self.tables, lens, out, share)


def _case(memory: Tensor, dtype, shape: tuple[int, int, int], group: int) -> _Case:
    """Case of the number of rows that fills the memory.

    memory: bytes, flat. shape: a row's [kv_heads, seq, head_dim]. group: query heads of a KV head.
    Raises ValueError if one row doesn't fit.
    """
    import torch

    from flexgen_ray.config import PAGE_TOKENS

    kv_heads, seq, head_dim = shape
    typed, pages_of_row = memory.view(dtype), -(-seq // PAGE_TOKENS)
    _repeat(_pattern(head_dim).to(dtype), typed)
    page = kv_heads, PAGE_TOKENS, head_dim
    per_row = 2 * pages_of_row * prod(page)
    rows = typed.numel() // per_row
    if rows == 0:
        needed = per_row * dtype.itemsize >> 20
        raise ValueError(f"one sequence needs {needed} MB; raise --megabytes or lower --context")
    keys, values = typed[: rows * per_row].view(2, rows * pages_of_row, *page)
    q = torch.randn(rows, kv_heads * group, head_dim).to(dtype)
    tables = torch.arange(len(keys), dtype=torch.int32).view(rows, -1)
    return _Case(q, keys, values, tables, seq)


def _pattern(head_dim: int) -> Tensor:
    """Random vectors [PATTERN, head_dim], so that no two tokens of a sequence weigh the same."""
    import torch

    return torch.randn(PATTERN, head_dim, generator=torch.Generator().manual_seed(0))


def _repeat(pattern: Tensor, into: Tensor) -> None:
    """Fill a flat tensor with copies of the pattern."""
    pattern = pattern.flatten()
    for piece in into.split(len(pattern)):
        piece.copy_(pattern[: len(piece)])


def _forms(bits: list[int], sparsity: float | None) -> dict[str, tuple[int | None, float]]:
    """Bits and share of tokens of each form that is compared with the plain cache, by name."""
    forms: dict[str, tuple[int | None, float]] = {f"int{it}": (it, 1.0) for it in bits}
    if sparsity is not None:
        forms |= {"sparse": (None, sparsity)}
        forms |= {f"int{it}_sparse": (it, sparsity) for it in bits}
    return forms


def _attending(
    case: _Case, kernel: HostKernel, bits: int | None, share: float
) -> tuple[int, Callable[[], object]]:
    """Bytes that attention over the case's rows reads in one form, and a call that attends them.

    bits: of the quantized cache; None for the plain one. share: of the tokens that are attended.
    """
    import torch

    from flexgen_ray.config import kept_tokens
    from flexgen_ray.kernels.pack import pack
    from flexgen_ray.quant.packing import packed_bytes

    head_dim = case.q.shape[-1]
    if bits is not None:
        shape = (2, *case.keys.shape[:3], packed_bytes(head_dim, bits))
        cache = torch.empty(shape, dtype=torch.uint8)
        _repeat(pack(_pattern(head_dim), bits), cache.flatten())
        case = replace(case, keys=cache[0], values=cache[1])
    half = case.nbytes // 2
    nbytes = half + half // case.context * kept_tokens(case.context, share)
    return nbytes, case.attending(kernel, share)


def _measure(
    case: _Case,
    kernels: dict[str, HostKernel],
    others: dict[str, tuple[int, Callable[[], object]]],
    seconds: float,
    threads: int,
) -> dict:
    """Bytes per second of a plain read and of each kernel, and the kernels' fractions of it.

    Read and kernels take turns of one run each, since a shared machine's memory changes its speed
    within seconds. Figures are medians over turns; a fraction compares with the read of its own
    turn. of_bound: fraction of the read or, where that is slower, of the arithmetic.
    """
    q, keys = case.q, case.keys
    fmas = case.nbytes // keys.itemsize * q.shape[1] // keys.shape[1]
    runs = {name: case.attending(kernel) for name, kernel in kernels.items()}
    every = runs | {name: run for name, (_, run) in others.items()}
    turns = _take_turns(every, _plain_reads(keys, case.values), fmas, seconds, threads)
    middle = {name: median(turn[name] for turn in turns) for name in turns[0]}
    nbytes = case.nbytes
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
    """Seconds of each run, of the faster read and of `fmas` multiply-adds, for each turn."""
    for run in runs.values():
        run()
    turns, until = list[dict[str, float]](), time.perf_counter() + seconds
    while len(turns) < MIN_TURNS or time.perf_counter() < until:
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
    """Reductions that read memory fastest; the fastest one depends on the machine."""
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
        | package_versions("flexgen-ray", "torch", "numba", "llvmlite"),
    }
    result = made_by | measured
    for doubt in result.get("doubtful", ()):
        _say(f"doubtful: {doubt}")
    if path is not None:
        write_text(path, to_json(result, indent=2) + "\n")
    display(to_json(result))


if __name__ == "__main__":
    run_as_command(attention)
