"""Cases of host attention: pages with garbage around what is valid, plain or quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from flexgen_ray.kernels.host_attention import HostAttention
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.quant.packing import packed_bytes

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


ATTEND = HostAttention(threads=1)


@dataclass(frozen=True)
class Case:
    """Rows that attend their caches; attended, these are laid out in pages.

    k, v: [rows, kv_heads, seq, width]. page_tokens: tokens of a page. shared: number of first
    tokens that rows have in common, whose pages they share. seed: of the order of pages. sinks: of
    the heads, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lens: list[int]
    window: int | None = None
    page_tokens: int = 16
    shared: int = 0
    seed: int = 0
    sinks: Tensor | None = None

    def run(self, attend=ATTEND, sparsity=1.0, lse=None) -> Tensor:
        out = torch.empty_like(self.q)
        attend(self.q, *self.paged(), self.lens, out, sparsity, self.window, lse, self.sinks)
        return out

    def tokens(self, row: int) -> slice:
        """Positions of the tokens that a row attends."""
        end = self.lens[row]
        return slice(max(0, end - (self.window or end)), end)

    def paged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values in pages, in any order among others, and tables.

        Beside the tokens of k and v, pages and tables hold NaN or what is no number of a page.
        """
        random = torch.Generator().manual_seed(self.seed)
        (rows, kv_heads, seq, width), size, spare = self.k.shape, self.page_tokens, 3
        pages = -(-seq // size)
        order = torch.randperm(rows * pages + spare, generator=random)
        first, end = torch.arange(pages) * size, torch.tensor(self.lens)[:, None]
        start = torch.tensor([self.tokens(row).start for row in range(rows)])[:, None]
        attended = (first < end) & (first + size > start)
        own = order[: rows * pages].view(rows, pages)
        whole = (first + size <= end) & (first >= start) & (first + size <= self.shared)
        named = own.where(~(whole & whole[0]), own[0])
        shape = (2, len(order), kv_heads, size + spare, width + spare)
        pool = torch.full(shape, nothing(self.k.dtype), dtype=self.k.dtype)
        for plane, cached in zip(pool, (self.k, self.v), strict=True):
            padded = F.pad(cached, (0, 0, 0, pages * size - seq), value=nothing(cached.dtype))
            in_pages = padded.unflatten(2, (pages, size)).transpose(1, 2)
            plane[named[attended], :, :size, :width] = in_pages[attended]
        tables = torch.randint(-(2**31), 2**31, (rows, pages + 2), generator=random)
        tables[:, :pages] = named.where(attended, tables[:, :pages])
        keys, values = pool[..., :size, :width]
        return keys, values, tables.int()


def nothing(dtype: torch.dtype) -> float:
    """NaN, or bytes of which no number is made: a result that they influence is wrong."""
    return 255 if dtype == torch.uint8 else float("nan")


def make_case(
    dtype, kv_heads, group, head_dim, lens, spread=1.0, seed=0, window=None, page=16, shared=0,
    has_sinks=False,
) -> Case:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    rows, seq = len(lens), max(lens)
    cache = torch.full((2, rows, kv_heads, seq, head_dim), float("nan"), dtype=dtype)
    common = torch.randn(2, kv_heads, shared, head_dim, generator=random) * spread
    for row, end in enumerate(lens):
        values = torch.randn(2, kv_heads, end, head_dim, generator=random) * spread
        values[:, :, :shared] = common[:, :, :end]
        start = max(0, end - (window or end))
        cache[:, row, :, start:end] = values[:, :, start:].to(dtype)
    q = torch.randn(rows, kv_heads * group, head_dim, generator=random) * spread
    sinks = torch.randn(len(q[0]), generator=random) * 4 * spread if has_sinks else None
    return Case(q.to(dtype), *cache, list(lens), window, page, shared, seed, sinks)


def softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights of scores [heads, tokens], and the logarithm of the sum of exp(score).

    A sink is a token more, without a value.
    """
    if sinks is None:
        return scores.softmax(-1), scores.logsumexp(-1)
    scores = torch.cat((scores, sinks[:, None].double()), -1)
    return scores.softmax(-1)[:, :-1], scores.logsumexp(-1)


def reference(case: Case) -> Tensor:
    """Attention in float64, row by row."""
    return exact(case)[0]


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of the sum of exp(score), in float64, row by row."""
    rows, log_sums = [], []
    for row, (q, k, v) in enumerate(zip(case.q, case.k, case.v, strict=True)):
        group = q.shape[0] // k.shape[0]
        k, v = (x[:, case.tokens(row)].double().repeat_interleave(group, dim=0) for x in (k, v))
        scores = torch.einsum("hd,hsd->hs", q.double(), k) / q.shape[1] ** 0.5
        weights, log_sum = softmax(scores, case.sinks)
        rows.append(torch.einsum("hs,hsd->hd", weights, v))
        log_sums.append(log_sum)
    return torch.stack(rows), torch.stack(log_sums)


windows = st.sampled_from([None, 1, 2, 7, 64, 100])


page_sizes = st.sampled_from([8, 16, 32, 64])


def packed(case: Case, bits: int) -> tuple[Case, Case]:
    """The case with its cache packed, and that cache unpacked."""
    rows, kv_heads, seq, head_dim = case.k.shape
    shape = (2, rows, kv_heads, seq, packed_bytes(head_dim, bits))
    cache = torch.full(shape, nothing(torch.uint8), dtype=torch.uint8)
    unpacked = torch.zeros(2, rows, kv_heads, seq, head_dim)
    for kept, values, floats in zip(cache, (case.k, case.v), unpacked, strict=True):
        for row in range(rows):
            tokens = case.tokens(row)
            valid = kept[row, :, tokens]
            valid.copy_(pack(values[row, :, tokens], bits))
            unpack(valid, bits, floats[row, :, tokens])
    k, v = cache
    return replace(case, k=k, v=v), replace(case, k=unpacked[0], v=unpacked[1])
