"""Division of rows' tokens among the programs of a GPU, and the memory that it takes.

Knows numbers; no tensors, and needs no torch.
"""

from __future__ import annotations

from flexgen_ray.config import PAGE_TOKENS

PROGRAMS = 4  # of a multiprocessor, which then has loads under way while others compute
# Of a GPU. Larger ones get as many programs as one of this size, which bounds the workspace.
MOST_MULTIPROCESSORS = 192
LEAST_TOKENS = 256  # of a split: fewer cost more in merging than their share of the machine gains
MOST_SPLITS = 32


def num_splits(programs: int, most: int, multiprocessors: int = MOST_MULTIPROCESSORS) -> int:
    """Number of parts into which each row's tokens are divided, so that a GPU is filled.

    programs: those that one part takes, a program for each row and KV head.
    most: tokens that any row attends at most.
    """
    wanted = PROGRAMS * min(multiprocessors, MOST_MULTIPROCESSORS)
    return max(1, min(-(-wanted // programs), most // LEAST_TOKENS, MOST_SPLITS))


def attended(most: int, window: int | None) -> int:
    """Tokens in the pages that a row attends at most, if it has `most` at most."""
    return most if window is None else min(most, window + PAGE_TOKENS - 1)


def workspace_bytes(rows: int, heads: int, kv_heads: int, head_dim: int, most: int) -> int:
    """Bytes of the workspace of paged_cuda.attend_pages on any GPU; 0 if no row is divided.

    most: tokens that any row attends at most, as `attended` gives it where there is a window.
    """
    splits = num_splits(rows * kv_heads, most)
    return 0 if splits == 1 else partial_floats(splits, rows, heads, head_dim) * 4


def partial_floats(splits: int, rows: int, heads: int, head_dim: int) -> int:
    """Float32 numbers of partial results: a sum of values, its largest score and sum of weights."""
    return splits * rows * heads * (head_dim + 2)
