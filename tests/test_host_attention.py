"""Host attention (kernels/host_attention.py): right for every layout, whatever lies beside."""

from __future__ import annotations

import fcntl
import importlib
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import (
    ATTEND,
    TOLERANCE,
    Case,
    exact,
    make_case,
    page_sizes,
    reference,
    windows,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_ray.kernels import host_attention, host_kernel, pack_host, vectors
from flexgen_ray.kernels.host_attention import HostAttention
from flexgen_ray.kernels.vectors import LANES, hash_sources

cases = st.builds(
    make_case,
    dtype=st.sampled_from(list(TOLERANCE)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.integers(LANES, 144),
    lens=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    spread=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 2**20),
    window=windows,
    page=page_sizes,
    shared=st.integers(0, 100),
    has_sinks=st.booleans(),
)


@given(case=cases, part_tokens=st.sampled_from([1, 7, 64, 100, 1024]))
@settings(max_examples=60, deadline=None)
def test_equals_a_float64_reference_and_reads_only_what_is_valid(case, part_tokens):
    """However rows are divided in parts."""
    expected, log_sums = exact(case)
    lse = torch.full(case.q.shape[:2], torch.nan)
    attend = HostAttention(threads=1, part_tokens=part_tokens)
    error = (case.run(attend, lse=lse).double() - expected).abs().max()
    assert error <= TOLERANCE[case.q.dtype] * max(1.0, expected.abs().max())
    torch.testing.assert_close(lse.double(), log_sums, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_size_and_the_order_of_pages_change_no_bit(dtype):
    case = make_case(dtype, 2, group=5, head_dim=80, lens=[7, 150, 64, 200], window=90)
    results = [replace(case, page_tokens=size, seed=size).run() for size in (8, 16, 32, 64)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("group", [7, 8, 9, 12, 16])
def test_any_number_of_heads_may_share_keys(group, head_dim, dtype):
    case = make_case(dtype, 2, group, head_dim, lens=[1, 7, 8, 63, 64, 65, 129])
    expected = reference(case)
    error = (case.run().double() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, expected.abs().max())


GUARDED = """
import ctypes, mmap, torch
from flexgen_ray.kernels.host_attention import HostAttention

attend, page = HostAttention(threads=1), mmap.PAGESIZE
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for head_dim in (64, 72):
        for group in (1, 2, 7, 8):
            for end in (1, 9, 64, 65, 100):
                # Pages of 16 tokens; what is left of the last one would lie in protected memory.
                pages, stride = -(-end // 16), 2 * head_dim
                nbytes = end * stride * dtype.itemsize
                size = -(-nbytes // page) * page
                memory = mmap.mmap(-1, size + 8 * page)
                start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
                assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), 8 * page, 0) == 0
                flat = torch.frombuffer(memory, dtype=dtype, offset=size - nbytes)
                flat[: end * stride] = 0.5
                shape, strides = (pages, 1, 16, head_dim), (16 * stride, 0, stride, 1)
                k, v = (torch.as_strided(flat, shape, strides, x) for x in (0, head_dim))
                tables = torch.arange(pages + 1, dtype=torch.int32)[None]
                q = torch.ones(1, group, head_dim, dtype=dtype)
                for keys, values in ((k, v), (v, k)):
                    attend(q, keys, values, tables, [end], out := torch.empty_like(q))
                    assert torch.equal(out, torch.full_like(out, 0.5))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_memory_beyond_what_is_valid_is_not_even_touched():
    subprocess.run([sys.executable, "-c", GUARDED], check=True, timeout=120)


def test_compiled_code_is_cached_until_any_file_it_may_hold_changes(tmp_path, monkeypatch):
    """numba itself looks at the file of the function only, and would run the old sibling's code."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(vectors, "_SOURCES", ("kernels_of_a_test",))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it doesn't see changes within a second
    folder = tmp_path / "kernels_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "kernel.py").write_text(
        "from flexgen_ray.kernels.vectors import compiled\n"
        "from kernels_of_a_test.sibling import add\n"
        "@compiled\n"
        "def kernel(x):\n"
        "    return add(x)\n"
    )
    results, cached = [], []
    for number in (1, 1, 2):
        sibling = f"import numba\n@numba.njit\ndef add(x):\n    return x + {number}\n"
        (folder / "sibling.py").write_text(sibling)
        for name in [name for name in sys.modules if name.startswith("kernels_of_a_test")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        hash_sources.cache_clear()
        kernel = importlib.import_module("kernels_of_a_test.kernel").kernel
        results.append(kernel(1))
        cached.append(sum(kernel.stats.cache_hits.values()))
    hash_sources.cache_clear()
    assert results == [2, 2, 3] and cached == [0, 1, 0]


def test_a_process_waits_for_one_that_compiles_the_same_kernel(tmp_path, monkeypatch):
    """And takes over its code; else numba's index could name the code of one kind for another."""
    (tmp_path / "waiting.py").write_text(
        "from flexgen_ray.kernels.vectors import compiled\n"
        "@compiled\n"
        "def kernel(x):\n"
        "    return x + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kernels = []
    for _ in range(2):
        sys.modules.pop("waiting", None)
        kernels.append(importlib.import_module("waiting").kernel)
    other = Path(kernels[0].stats.cache_path) / "kernel.lock"
    results: list[int] = []
    with other.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: results.append(kernels[0](1)))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not results and not kernels[0].signatures
    waiting.join(60)
    assert results == [2] and kernels[1](1) == 2
    assert [sum(kernel.stats.cache_hits.values()) for kernel in kernels] == [0, 1]


def test_a_kernel_is_cached_for_the_sources_of_attention_and_quantization():
    digest = hash_sources("flexgen_ray.kernels", "flexgen_ray.quant")
    for kernel in (host_attention._attend, pack_host._pack, pack_host._unpack):
        assert kernel.py_func.__qualname__.endswith(digest)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_number_of_threads_and_the_company_of_a_row_change_no_bit(dtype):
    lens = [700, 1, 63, 64, 65, 1024, 2500]
    case = make_case(dtype, kv_heads=3, group=15, head_dim=80, lens=lens)
    alone = case.run()
    for threads in (2, 3):
        assert torch.equal(case.run(HostAttention(threads)), alone)
    divided = case.run(HostAttention(threads=1, part_tokens=100))
    assert all(torch.equal(case.run(HostAttention(5, 100)), divided) for _ in range(5))
    for row, end in enumerate(case.lens):
        part = slice(row, row + 1)
        single = Case(case.q[part], case.k[part], case.v[part], [end])
        assert torch.equal(single.run(), alone[part])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_scores_do_not_overflow(dtype):
    case = make_case(dtype, kv_heads=2, group=4, head_dim=64, lens=[300, 7], spread=200.0)
    expected = reference(case)
    assert torch.allclose(case.run().double(), expected, rtol=1e-2, atol=1e-2 * 200)
    case.k.mul_(0).sub_(100)
    assert torch.isfinite(case.run()).all()


def test_a_sum_over_a_hundred_thousand_tokens_stays_exact():
    case = make_case(torch.float16, kv_heads=1, group=1, head_dim=LANES, lens=[100_000])
    assert (case.run().double() - reference(case)).abs().max() < 1e-4


def test_tensors_that_do_not_fit_together_are_refused():
    good = make_case(torch.float32, kv_heads=2, group=2, head_dim=32, lens=[5, 3])
    out, (keys, values, tables) = torch.empty_like(good.q), good.paged()
    pages = keys, values, tables, good.lens
    with pytest.raises(ValueError, match="lens"):
        ATTEND(good.q, keys, values, tables, [16 * tables.shape[1] + 1, 3], out)
    with pytest.raises(ValueError, match="multiple"):
        ATTEND(good.q[:, :3], *pages, out[:, :3])
    with pytest.raises(ValueError, match="dtype"):
        ATTEND(good.q.half(), *pages, out)
    with pytest.raises(ValueError, match="fit together"):
        ATTEND(good.q, keys[:1], *pages[1:], out)
    for wrong in (tables.long(), tables[:1], tables[0]):
        with pytest.raises(ValueError, match="tables must be int32"):
            ATTEND(good.q, keys, values, wrong, good.lens, out)
    with pytest.raises(ValueError, match="lse"):
        ATTEND(good.q, *pages, out, lse=out[..., 0].double())


@pytest.mark.parametrize("page", [-1, 5])
def test_a_page_that_the_cache_lacks_is_refused(page):
    case = make_case(torch.float32, kv_heads=2, group=2, head_dim=32, lens=[5, 3])
    keys, values, tables = case.paged()
    assert len(keys) == 5
    tables[1, 0] = page
    with pytest.raises(ValueError, match="row 1 name a page beyond the 5"):
        ATTEND(case.q, keys, values, tables, case.lens, torch.empty_like(case.q))


@given(case=cases, name=st.sampled_from(host_kernel.KERNELS))
@settings(max_examples=25, deadline=None)
def test_both_kernels_share_a_signature(case, name):
    expected, log_sums = exact(case)
    lse = torch.empty(case.q.shape[:2])
    result = case.run(host_kernel.load_kernel(name, threads=2), lse=lse)
    error = (result.double() - expected).abs().max()
    assert error <= 2 * TOLERANCE[case.q.dtype] * max(1.0, expected.abs().max())
    torch.testing.assert_close(lse.double(), log_sums, atol=1e-4, rtol=1e-4)


def test_a_choice_is_measured_once_and_kept(tmp_path, monkeypatch):
    shape = host_kernel.AttentionShape("float32", num_heads=4, num_kv_heads=2, head_dim=64)
    times = {"sdpa": 1.0, "numba": 2.0}
    monkeypatch.setattr(host_kernel, "measure", lambda shape, threads, nbytes: times)
    assert host_kernel.choose_kernel(shape, 2, tmp_path) == "sdpa"
    times["sdpa"] = 3.0
    assert host_kernel.choose_kernel(shape, 2, tmp_path) == "sdpa"
    assert host_kernel.choose_kernel(shape, 3, tmp_path) == "numba"
    (kept,) = tmp_path.iterdir()
    for text in ("{", "[]", '{"a": 1}', "\0"):
        kept.write_text(text)
        assert host_kernel.choose_kernel(shape, 2, tmp_path) == "numba"
    kept.unlink()
    tmp_path.joinpath("taken").write_text("")
    assert host_kernel.choose_kernel(shape, 2, tmp_path / "taken" / "below") == "numba"


def test_measuring_takes_both_kernels_and_little_time():
    times = host_kernel.measure(host_kernel.AttentionShape("float32", 4, 2, 64), threads=2)
    assert set(times) == {"sdpa", "numba"} and all(seconds > 0 for seconds in times.values())


def test_heads_smaller_than_a_vector_are_left_to_torch(tmp_path):
    shape = host_kernel.AttentionShape("float32", num_heads=2, num_kv_heads=2, head_dim=4)
    assert host_kernel.choose_kernel(shape, 2, tmp_path) == "sdpa"
