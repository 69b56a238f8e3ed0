"""Rate of float32 multiply-adds that the CPU can do: one of the two limits of host attention.

Chains of multiply-adds run in registers, with nothing to load. Knows no attention.
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

from flexgen_ray.kernels.host_kernel import best_seconds
from flexgen_ray.kernels.vectors import I32, LANES, constant, emit_loop, fma, splat

# Enough chains that none waits for its own last result, and few enough for a register each.
_CHAINS = 12
_STEPS = 1_000_000

_intrinsic: Callable[[Callable], Any] = intrinsic


def fma_per_s(threads: int, seconds: float) -> float:
    """Multiply-adds per second of this many threads together, in the best of several runs.

    seconds: time to spend on measuring.
    """
    start = np.float32(0.5)
    _run_chains(1, start)
    with ThreadPoolExecutor(threads) as pool:

        def run() -> None:
            for future in [pool.submit(_run_chains, _STEPS, start) for _ in range(threads)]:
                future.result()

        return threads * _STEPS * _CHAINS * LANES / best_seconds(run, seconds)


@_intrinsic
def _chains(context, steps, x):
    """Compute y = y * x + x in each chain, `steps` times; returns the sum of all chains.

    The sum keeps the compiler from removing a chain. steps: int64; x: float32.
    """

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
