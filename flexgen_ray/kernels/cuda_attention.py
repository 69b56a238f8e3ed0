"""Choice of the kernel that attends decoding rows on a GPU: Triton's, where it works.

Knows what the kernel takes; not how it works.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

_log = logging.getLogger(__name__)


@cache
def page_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType | None:
    """Module whose attend_pages walks pages on a GPU; None if Triton lacks, or has no such kernel.

    Triton comes with most of torch's CUDA packages, and needs a C compiler when it runs. Without it
    a warning is logged once, and rows' pages are copied side by side before they are attended.
    """
    if not find_spec("triton"):
        reason = "Triton isn't installed"
    else:
        paged = import_module("flexgen_ray.kernels.paged_cuda")
        if head_dim % 16 or head_dim > paged.MOST_DIM:
            return None
        try:
            _attend_one_token(paged, device, dtype, head_dim)
        except Exception as error:
            reason = f"Triton can't compile here: {error}"
        else:
            return paged
    _log.warning(
        "%s; decoding rows are attended by torch's own kernels, which are slower and need more "
        "memory; install triton, a C compiler and Python's headers (gcc, python3-dev)",
        reason,
    )
    return None


def _attend_one_token(
    paged: ModuleType, device: torch.device, dtype: torch.dtype, head_dim: int
) -> None:
    q = torch.zeros(1, 1, head_dim, dtype=dtype, device=device)
    pages = torch.zeros(2, 1, 1, paged.PAGE_TOKENS, head_dim, dtype=dtype, device=device)
    tables = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lens = torch.ones(1, dtype=torch.int32, device=device)
    paged.attend_pages(q, pages[0], pages[1], tables, lens, torch.empty_like(q), most=1)
