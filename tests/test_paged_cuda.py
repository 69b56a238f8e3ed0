"""The Triton kernel that attends to pages: it gives what torch gives of the same tokens in float64.

On a GPU it does so compiled. Without one it is interpreted, in a process that tests/test_triton.py
starts; and it compiles.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import paged as made_for_gpus
from flexgen_ray.kernels import pack_plain as plain
from flexgen_ray.kernels import paged_splits
from flexgen_ray.quant.packing import packed_bytes

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process of its own")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="compiles")
needs_gpu = pytest.mark.skipif(
    IS_INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"
)

PAGE = paged_splits.PAGE_TOKENS
ELSEWHERE = 2**30  # a page far beyond every pool
# Weights are rounded to the values' own precision where tensor cores multiply them.
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class Case:
    """Rows over pages; everything beside their tokens is NaN, and other entries lead elsewhere."""

    lens: list[int]
    kv_heads: int = 1
    sharing: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    bits: int | None = None
    window: int | None = None
    has_sinks: bool = False
    is_shared: bool = False  # rows begin with the same page
    loose: int = 0  # tokens by which the bound on lengths is too large
    has_dot: bool = True  # as on a GPU whose tensor cores Triton uses
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.sharing
        # Room beside the dense dimension: nothing may rely on contiguous queries and results.
        shape = (len(self.lens), heads + 1, self.head_dim + 16)
        q, sinks = torch.randn(shape, generator=random), torch.randn(heads, generator=random) * 3
        self.q = q.to(self.device, self.dtype)[:, :heads, : self.head_dim]
        out = torch.full(shape, 7.0, dtype=self.dtype, device=self.device)
        self.out = out[:, 1:, : self.head_dim]
        self.lse = torch.full((len(self.lens), heads + 1), 7.0, device=self.device)[:, :heads]
        self.sinks = sinks.to(self.device) if self.has_sinks else None
        self.lay_out(random)

    def lay_out(self, random: torch.Generator) -> None:
        """Write the rows' tokens to pages in any order."""
        counts = [-(-length // PAGE) for length in self.lens]
        used = sum(counts) + 2
        shape = (used, 2, self.kv_heads, PAGE, self.head_dim)
        content = torch.randn(shape, generator=random).to(self.dtype)
        order = torch.randperm(used, generator=random).tolist()
        tables = torch.full((len(self.lens), max(counts) + 1), ELSEWHERE, dtype=torch.int32)
        is_valid = torch.zeros(used, PAGE, dtype=torch.bool)
        for row, length in enumerate(self.lens):
            begin = max(0, length - (self.window or length))
            for nth in range(begin // PAGE, counts[row]):
                page = order[-1] if self.is_shared and nth == 0 else order.pop(0)
                tables[row, nth] = page
                tokens = torch.arange(nth * PAGE, nth * PAGE + PAGE)
                is_valid[page] |= (tokens >= begin) & (tokens < length)
        self.tables, self.values_of = tables, content
        if self.bits is None:
            pool = content.clone()
        else:
            pool = torch.empty(*shape[:-1], packed_bytes(self.head_dim, self.bits)).byte()
            plain.pack(content, self.bits, pool)
            plain.unpack(pool, self.bits, content)
        garbage = math.nan if self.bits is None else 255  # as float16 both are NaN
        pool[~is_valid[:, None, None].expand(pool.shape[:-1])] = garbage
        # Planes apart, as pages of a layer lie.
        self.pool = pool.transpose(0, 1).contiguous().to(self.device)

    def attend(self, **options) -> None:
        from flexgen_ray.kernels import paged_cuda

        multiprocessors, has_dot = paged_cuda.machine(self.q.device)
        machine = multiprocessors, has_dot and self.has_dot
        lens = torch.tensor(self.lens, dtype=torch.int32, device=self.device)
        with mock.patch.object(paged_cuda, "machine", lambda device: machine):
            paged_cuda.attend_pages(
                self.q, *self.pool, self.tables.to(self.device), lens, self.out,
                most=max(self.lens) + self.loose, window=self.window, lse=self.lse,
                sinks=self.sinks, **options,
            )  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor]:
        """Result and logarithm of the denominator, in float64."""
        outs, ends, queries = [], [], self.q.cpu().double()
        sinks = None if self.sinks is None else self.sinks[:, None].cpu().double()
        for row, length in enumerate(self.lens):
            tokens = torch.arange(max(0, length - (self.window or length)), length)
            pages = self.tables[row, tokens // PAGE].long()
            k, v = self.values_of[pages, :, :, tokens % PAGE].double().permute(1, 2, 0, 3)
            q = queries[row].view(self.kv_heads, self.sharing, -1)
            scores = (q @ k.transpose(-1, -2) / self.head_dim**0.5).flatten(0, 1)
            if sinks is not None:
                scores = torch.cat((scores, sinks), -1)
            ends.append(scores.logsumexp(-1))
            weights = scores.softmax(-1)[:, : len(tokens)]
            weights = weights.view(self.kv_heads, self.sharing, -1)
            outs.append((weights @ v).flatten(0, 1))
        return torch.stack(outs), torch.stack(ends)

    def check(self) -> None:
        out, lse = self.expected()
        # A GPU's powers of two are approximate.
        error = ERROR[self.dtype] * (1 if self.device == "cpu" else 2)
        torch.testing.assert_close(self.out.cpu().double(), out, rtol=error, atol=error)
        torch.testing.assert_close(self.lse.cpu().double(), lse, rtol=1e-5, atol=1e-5)
        assert (self.lse._base[:, -1] == 7).all()
        assert (self.out._base[:, 0] == 7).all()
        assert (self.out._base[..., self.head_dim :] == 7).all()


CASES = dict(
    kv_heads=st.integers(1, 2),
    sharing=st.sampled_from([1, 2, 3, 8, 9]),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    bits=st.sampled_from([None, 4, 8]),
    window=st.one_of(st.none(), st.integers(1, 110)),
    has_sinks=st.booleans(),
    is_shared=st.booleans(),
    loose=st.sampled_from([0, 5000]),
    has_dot=st.booleans(),
    seed=st.integers(0, 2**20),
)
# The interpreter rounds to bfloat16 otherwise than compiled code, and takes its time for a row.
few = st.builds(
    Case,
    lens=st.lists(st.integers(1, 100), min_size=1, max_size=2),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    **CASES,
)
many = st.builds(
    Case,
    lens=st.lists(st.integers(1, 1500), min_size=1, max_size=40),
    dtype=st.sampled_from([*ERROR]),
    device=st.just("cuda"),
    **CASES,
)


def check_rows_over_pages(case: Case) -> None:
    """All kinds of caches, windows and splits; beside the rows' tokens there is only NaN."""
    if case.window is not None:
        case.is_shared = False
    case.attend()
    case.check()


@interpreted
@settings(max_examples=12, deadline=None)
@given(case=few)
def test_rows_over_pages_equal_torch(case):
    check_rows_over_pages(case)


@pytest.mark.gpu
@needs_gpu
@settings(max_examples=40, deadline=None)
@given(case=st.one_of(few.map(lambda case: replace(case, device="cuda")), many))
def test_rows_over_pages_equal_torch_on_a_gpu(case):
    """Each kind of cache and heads is compiled once."""
    check_rows_over_pages(case)


@interpreted
@pytest.mark.parametrize("has_dot", [True, False])
def test_a_row_of_several_tiles_in_many_splits_equals_torch(has_dot):
    """More splits than the shorter rows have tokens for; the workspace is what its bytes say."""
    case = Case([700, 1, 65], sharing=2, has_dot=has_dot, has_sinks=True, loose=5000)
    size = paged_splits.workspace_bytes(3, 2, 1, 64, 5700)
    workspace = torch.full((size // 4,), math.nan)
    case.attend(workspace=workspace)
    assert not workspace.isnan().all()
    case.check()


@interpreted
@pytest.mark.parametrize("loose", [0, 5000])
def test_a_row_without_tokens_gets_zeros_and_weighs_nothing(loose):
    case = Case([20, 20], loose=loose)
    case.lens[0] = 0
    case.attend()
    assert not case.out[0].any() and (case.lse[0] == -math.inf).all()
    assert case.out[1].all() and case.lse[1].isfinite().all()


@interpreted
@pytest.mark.parametrize("loose", [0, 5000])
@pytest.mark.parametrize("has_dot", [True, False])
@pytest.mark.parametrize("plane", [0, 1])
def test_a_token_that_is_not_finite_shows_in_its_own_row_alone(plane, has_dot, loose):
    case = Case([40, 40], has_dot=has_dot, loose=loose)
    case.pool[plane, case.tables[0, 1], 0, 3] = math.nan
    case.attend()
    assert case.out[0].isnan().all() and case.out[1].isfinite().all()
    assert case.lse[0].isnan().all() == (plane == 0)


@interpreted
def test_tensors_that_no_kernel_takes_are_errors():
    case = Case([20])
    case.q, case.out = case.q[..., :40], case.out[..., :40]
    with pytest.raises(ValueError, match="40 dimensions, not a multiple of 16"):
        case.attend()
    case = Case([20], loose=5000)
    with pytest.raises(ValueError, match="workspace has 8 numbers"):
        case.attend(workspace=torch.empty(8))
    case.tables = case.tables.long()
    with pytest.raises(ValueError, match=r"torch\.int32 \[1, pages\]"):
        case.attend()


@compiled
@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 2000),
    kv_heads=st.integers(1, 64),
    most=st.integers(1, 200_000),
    multiprocessors=st.integers(1, 300),
)
def test_a_workspace_holds_the_parts_of_any_gpu(rows, kv_heads, most, multiprocessors):
    """And every split has work for the longest row; machines are filled where rows allow."""
    programs = rows * kv_heads
    splits = paged_splits.num_splits(programs, most, multiprocessors)
    size = paged_splits.workspace_bytes(rows, 2 * kv_heads, kv_heads, 64, most)
    parts = paged_splits.partial_floats(splits, rows, 2 * kv_heads, 64) * 4
    assert size >= parts if splits > 1 else size % 4 == 0
    assert splits == 1 or most >= splits * paged_splits.LEAST_TOKENS
    if splits < min(paged_splits.MOST_SPLITS, most // paged_splits.LEAST_TOKENS):
        assert programs * splits >= 4 * min(multiprocessors, paged_splits.MOST_MULTIPROCESSORS)


VARIANTS = (
    {"capability": 75, "bits": None, "dtype": "fp16", "head_dim": 128, "sharing": 8},
    {"capability": 75, "bits": 4, "dtype": "fp16", "head_dim": 64, "sharing": 1},
    {"capability": 80, "bits": None, "dtype": "fp32", "head_dim": 128, "sharing": 1},
    {"capability": 80, "bits": 8, "dtype": "bf16", "head_dim": 80, "sharing": 4},
    {"capability": 90, "bits": None, "dtype": "fp16", "head_dim": 128, "sharing": 8},
)


@compiled
@pytest.mark.parametrize("nth", range(len(VARIANTS)))
def test_the_compiler_takes_the_kernel_and_spills_nothing(nth):
    """A tile's keys and values are loaded once, 16 bytes at a time where they lie so."""
    case = VARIANTS[nth]
    made = made_for_gpus.compiled(case, is_split=nth % 2 == 0, has_sinks=nth == 1)
    assert made.asm["cubin"]
    if made_for_gpus.nvidia_tool("nvdisasm") is None:
        pytest.skip("needs NVIDIA's disassembler, which comes with Triton")
    names = made_for_gpus.loop(made)
    assert names and not any(name.startswith(("LDL", "STL")) for name in names)
    if case["bits"] is None:
        loads = sum(name.startswith(("LDG", "LDGSTS")) and ".128" in name for name in names)
        tile = made_for_gpus.constants(case)["TILE"]
        assert loads == made_for_gpus.tile_bytes(case, tile) // (16 * 32 * 4)


@compiled
@pytest.mark.parametrize("capability", made_for_gpus.CAPABILITIES)
def test_the_compiler_takes_the_merge(capability):
    case = VARIANTS[0] | {"capability": capability}
    assert made_for_gpus.compiled_merge(case, splits=8).asm["cubin"]


@compiled
def test_the_kernels_know_no_number_that_changes_from_pass_to_pass():
    """Triton would compile anew for numbers that are 1 or a multiple of 16."""
    from flexgen_ray.kernels import paged_cuda

    for kernel in (paged_cuda._attend, paged_cuda._merge):
        for parameter in kernel.params:
            is_tensor = parameter.name in made_for_gpus.POINTERS
            assert parameter.is_constexpr or is_tensor or parameter.do_not_specialize
