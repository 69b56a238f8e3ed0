"""Cases of host attention: caches with garbage around what is valid, plain or quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from flexgen_ray.kernels.host_attention import HostAttention
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.quant.packing import packed_bytes

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


ATTEND = HostAttention(threads=1)


@dataclass(frozen=True)
class Case:
    """Views into a larger cache that holds NaN wherever no row attends it."""

    q: Tensor
    k: Tensor
    v: Tensor
    lens: list[int]
    window: int | None = None

    def run(self, attend=ATTEND, sparsity=1.0) -> Tensor:
        out = torch.empty_like(self.q)
        attend(self.q, self.k, self.v, self.lens, out, sparsity, self.window)
        return out

    def tokens(self, row: int) -> slice:
        """Positions of the tokens that a row attends."""
        end = self.lens[row]
        return slice(max(0, end - (self.window or end)), end)


def make_case(dtype, kv_heads, group, head_dim, lens, spread=1.0, seed=0, window=None) -> Case:
    random = torch.Generator().manual_seed(seed)
    rows, seq, spare = len(lens), max(lens), 3
    shape = (2, rows + spare, kv_heads, seq + spare, head_dim + spare)
    cache = torch.full(shape, float("nan"), dtype=dtype)
    for row, end in enumerate(lens):
        values = torch.randn(2, kv_heads, end, head_dim, generator=random) * spread
        start = max(0, end - (window or end))
        cache[:, row + 1, :, start:end, :head_dim] = values[:, :, start:].to(dtype)
    k, v = cache[:, 1 : rows + 1, :, :seq, :head_dim]
    q = torch.randn(rows, kv_heads * group, head_dim, generator=random) * spread
    return Case(q.to(dtype), k, v, list(lens), window)


def reference(case: Case) -> Tensor:
    rows = []
    for row, (q, k, v) in enumerate(zip(case.q, case.k, case.v, strict=True)):
        group = q.shape[0] // k.shape[0]
        k, v = (x[:, case.tokens(row)].double().repeat_interleave(group, dim=0) for x in (k, v))
        scores = torch.einsum("hd,hsd->hs", q.double(), k) / q.shape[1] ** 0.5
        rows.append(torch.einsum("hs,hsd->hd", scores.softmax(-1), v))
    return torch.stack(rows)


windows = st.sampled_from([None, 1, 2, 7, 64, 100])


def packed(case: Case, bits: int) -> tuple[Case, Case]:
    """The case with its cache packed, among bytes of which no number is made; and unpacked."""
    rows, kv_heads, seq, head_dim = case.k.shape
    size, spare = packed_bytes(head_dim, bits), 2
    cache = torch.full((2, rows + spare, kv_heads, seq + spare, size + spare), 255).byte()
    unpacked = torch.zeros(2, rows, kv_heads, seq, head_dim)
    for kept, values, floats in zip(cache, (case.k, case.v), unpacked, strict=True):
        for row in range(rows):
            tokens = case.tokens(row)
            valid = kept[row + 1, :, tokens, :size]
            valid.copy_(pack(values[row, :, tokens], bits))
            unpack(valid, bits, floats[row, :, tokens])
    k, v = cache[:, 1 : rows + 1, :, :seq, :size]
    return replace(case, k=k, v=v), replace(case, k=unpacked[0], v=unpacked[1])
