"""OpenMP's threads, where torch brings GNU's runtime. Knows no tensors.

Threads of a team wait for each other by spinning, which a small product needs: woken by the system
they are too late. But GNU's runtime lets them spin only while all the teams there ever were have
no more threads than there are cores. So a team that has done its work must go.
"""

from __future__ import annotations

import ctypes

_SOFT = 1  # omp_pause_soft: what was set stays, and the next parallel region makes a new team


def release_team() -> None:
    """Of the calling thread, if it has one."""
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)
