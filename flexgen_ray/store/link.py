"""Copies between host and device: asynchronous where host memory is pinned, large ones in pieces.

A GPU's copy engine takes one copy after the other, whichever stream they come from. Between the
pieces of a large copy, a small one that another lane waits for may pass. Knows no tiers.
"""

from __future__ import annotations

from torch import Tensor

from flexgen_ray.layout.placement import COPY_PIECE


def copy_across(target: Tensor, source: Tensor) -> None:
    """Copy a tensor, if it crosses the link in pieces of at most COPY_PIECE bytes.

    Doesn't wait for the copy. Both are contiguous and of one dtype if the tensor crosses the link:
    others would be staged, and waited for.
    """
    if source.nbytes <= COPY_PIECE or not crosses_link(target, source):
        target.copy_(source, non_blocking=True)
        return
    step = COPY_PIECE // source.itemsize
    pieces = zip(target.view(-1).split(step), source.view(-1).split(step), strict=True)
    for to, of in pieces:
        to.copy_(of, non_blocking=True)


def crosses_link(target: Tensor, source: Tensor) -> bool:
    """True if a copy leaves one device for another."""
    return target.device != source.device
