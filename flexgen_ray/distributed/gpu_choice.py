"""The GPUs that a run's own Ray cluster sees: all of this machine's, or the one of `cuda:N`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

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
