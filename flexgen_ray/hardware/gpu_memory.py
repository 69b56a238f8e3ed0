"""GPU memory beside torch's allocator: what CUDA's libraries take when they are first used.

The kernels of a library are loaded onto the GPU with the first of them that is launched, and that
memory comes from no budget. So it is taken before a machine says how much is free.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

_DTYPES = (torch.float32, torch.float16)


@cache
def load_libraries(device: torch.device) -> int:
    """Use products and attention for the first time; returns the bytes that they took by it.

    Each process does it once for a GPU, and has the first answer from then on. Bytes that other
    processes take at the same moment are counted too.
    """
    before = _bytes_beside_torch(device)
    with torch.inference_mode():
        for dtype in _DTYPES:
            x = torch.zeros(1, 8, 16, 64, dtype=dtype, device=device)
            linear(x, torch.zeros(64, 64, dtype=dtype, device=device), x[0, 0, 0])
            mask = torch.zeros(1, 1, 16, 16, dtype=dtype, device=device)
            scaled_dot_product_attention(x, x, x, attn_mask=mask)
            scaled_dot_product_attention(x, x, x, is_causal=True)
            x.float().softmax(-1).sort()
    del x, mask
    drop_workspaces()
    return max(0, _bytes_beside_torch(device) - before)


def drop_workspaces() -> None:
    """Free the workspaces of streams that have multiplied, and what the allocator keeps."""
    if torch.cuda.is_initialized():
        torch._C._cuda_clearCublasWorkspaces()  # type: ignore[attr-defined]
        torch.cuda.empty_cache()


def _bytes_beside_torch(device: torch.device) -> int:
    """Bytes of the GPU that are taken, except those that torch's allocator holds."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
