"""What glibc's allocator keeps of freed memory, if that is the allocator. Knows no tensors."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), and what sizes they take here.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_MIB = 2**20


def for_loading() -> None:
    """Large temporaries go back to the system when freed: each is another tensor's."""
    _set(_M_ARENA_MAX, 1)
    _set(_M_MMAP_THRESHOLD, 4 * _MIB)


def for_ops() -> None:
    """Temporaries are kept for the next op, once for all lanes: pages that were given back cost
    more, when they are touched anew, than a small model's products. But not large ones, which leave
    holes that nothing fits: up to 32 MiB they took 2.7 times what was live at most, up to 8 MiB
    1.5 times (cost/sizes.py)."""
    _set(_M_MMAP_THRESHOLD, 8 * _MIB)
    _set(_M_TRIM_THRESHOLD, 64 * _MIB)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
