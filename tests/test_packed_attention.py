"""Host attention over a packed cache: as over the same cache unpacked, and nothing else is read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    ATTEND,
    TOLERANCE,
    Case,
    make_case,
    packed,
    page_sizes,
    reference,
    windows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_ray.kernels import host_kernel
from flexgen_ray.kernels.host_attention import HostAttention
from flexgen_ray.kernels.vectors import LANES


def error(case: Case, bits: int, attend=ATTEND) -> Tensor:
    """The largest difference, in units of what the dtype's rounding allows."""
    over_packed, over_unpacked = packed(case, bits)
    expected = reference(over_unpacked)
    difference = (over_packed.run(attend).double() - expected).abs().max()
    return difference / (TOLERANCE[case.q.dtype] * max(1.0, expected.abs().max()))


cases = st.builds(
    make_case,
    dtype=st.sampled_from(list(TOLERANCE)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.one_of(st.integers(LANES, 200), st.sampled_from([64, 80, 96, 120, 128])),
    lens=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    spread=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 2**20),
    window=windows,
    page=page_sizes,
    shared=st.integers(0, 100),
    has_sinks=st.booleans(),
)


@given(case=cases, bits=st.sampled_from([4, 8]))
@settings(max_examples=25, deadline=None)
def test_equals_attention_over_the_unpacked_cache_and_reads_only_what_is_valid(case, bits):
    assert error(case, bits) <= 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 120, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16])
def test_any_number_of_heads_may_share_packed_keys(group, head_dim, bits):
    if head_dim < LANES:
        pytest.skip(f"heads below {LANES} are left to torch on this CPU")
    case = make_case(torch.float32, 2, group, head_dim, lens=[1, 7, 64, 65, 129])
    assert error(case, bits) <= 1


@pytest.mark.parametrize("bits", [4, 8])
def test_the_number_of_threads_and_the_company_of_a_row_change_no_bit(bits):
    case = make_case(torch.float16, 3, group=15, head_dim=80, lens=[700, 1, 63, 64, 65, 1024])
    case, _ = packed(case, bits)
    alone = case.run()
    for threads in (2, 3):
        assert torch.equal(case.run(HostAttention(threads)), alone)
    for row, end in enumerate(case.lens):
        part = slice(row, row + 1)
        single = Case(case.q[part], case.k[part], case.v[part], [end])
        assert torch.equal(single.run(), alone[part])


GUARDED = """
import ctypes, mmap, torch
from flexgen_ray.kernels.host_attention import HostAttention
from flexgen_ray.kernels.vectors import LANES
from flexgen_ray.quant.packing import packed_bytes

attend, page = HostAttention(threads=1), mmap.PAGESIZE
for bits in (4, 8):
    for head_dim in (LANES, 64, 65, 72, 128):
        for group in (1, 2, 7, 8):
            for end in (1, 9, 64, 65, 100):
                size = packed_bytes(head_dim, bits)
                # Pages of 16 tokens; what is left of the last one would lie in protected memory.
                pages, stride = -(-end // 16), 2 * size
                nbytes = end * stride
                whole = -(-nbytes // page) * page
                memory = mmap.mmap(-1, whole + 8 * page)
                start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
                assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + whole), 8 * page, 0) == 0
                flat = torch.frombuffer(memory, dtype=torch.uint8, offset=whole - nbytes)
                flat[:nbytes] = 0
                shape, strides = (pages, 1, 16, size), (16 * stride, 0, stride, 1)
                k, v = (torch.as_strided(flat, shape, strides, x) for x in (0, size))
                tables = torch.arange(pages + 1, dtype=torch.int32)[None]
                q = torch.ones(1, group, head_dim)
                for keys, values in ((k, v), (v, k)):
                    attend(q, keys, values, tables, [end], out := torch.ones_like(q))
                    assert torch.equal(out, torch.zeros_like(out))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_memory_beyond_what_is_valid_is_not_even_touched():
    subprocess.run([sys.executable, "-c", GUARDED], check=True, timeout=120)


def test_caches_that_do_not_fit_are_refused():
    case, _ = packed(make_case(torch.float16, 2, group=2, head_dim=64, lens=[5, 3]), bits=4)
    with pytest.raises(ValueError, match="36 in 4 bits or 68 in 8 bits, not 35"):
        replace(case, k=case.k[..., :35], v=case.v[..., :35]).run()
    keys, values, tables = case.paged()
    with pytest.raises(ValueError, match="fit together"):
        ATTEND(case.q, keys, values[:1], tables, case.lens, case.q)
    with pytest.raises(ValueError, match="dtype"):
        ATTEND(case.q, keys, values, tables, case.lens, case.q.float())


@pytest.mark.parametrize("name", host_kernel.KERNELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_both_kernels_attend_a_packed_cache(name, bits):
    case = make_case(torch.float32, 2, group=3, head_dim=80, lens=[33, 57, 1], window=20)
    assert error(case, bits, host_kernel.load_kernel(name, threads=2)) <= 2


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_measuring_counts_the_values_that_torch_gathers_and_dequantizes(monkeypatch, bits):
    taken = []

    def load(name, threads):
        def attend(q, keys, values, *_):
            dequantized = 0 if bits is None else 2 * keys[..., 0].numel() * q.shape[-1] * 2
            taken.append(2 * (keys.nbytes + values.nbytes) + dequantized)

        return attend

    monkeypatch.setattr(host_kernel, "load_kernel", load)
    shape = host_kernel.AttentionShape("float16", num_heads=4, num_kv_heads=2, head_dim=64)
    host_kernel.measure(replace(shape, bits=bits), threads=1, nbytes=4 << 20)
    assert 2 << 20 < max(taken) <= 4 << 20


def test_a_choice_for_a_packed_cache_is_one_of_its_own(tmp_path, monkeypatch):
    plain = host_kernel.AttentionShape("float16", num_heads=4, num_kv_heads=2, head_dim=64)
    times = host_kernel.measure(replace(plain, bits=4), threads=1, nbytes=1 << 20)
    assert set(times) == set(host_kernel.KERNELS) and all(it > 0 for it in times.values())
    faster = {None: "sdpa", 4: "numba", 8: "sdpa"}
    monkeypatch.setattr(
        host_kernel, "measure", lambda shape, *_: dict.fromkeys(host_kernel.KERNELS, 2.0)
        | {faster[shape.bits]: 1.0}
    )  # fmt: skip
    for bits, name in faster.items():
        assert host_kernel.choose_kernel(replace(plain, bits=bits), 2, tmp_path) == name
