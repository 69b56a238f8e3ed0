"""How many float32 multiply-adds a second the CPU can do: the other bound of host attention.

Chains of them in registers, with nothing to load. Knows no attention.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from flexgen_ray.models.host_kernel import best_seconds
from flexgen_ray.models.host_vectors import I32, LANES, constant, emit_loop, fma, splat

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
