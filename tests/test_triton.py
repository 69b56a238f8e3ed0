"""Triton's kernels without a GPU: by its interpreter they give the bits of the others, and its
compiler takes them for every generation of GPUs. Skipped where Triton isn't installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import unpack as made_for_gpus
from benchmarks.unpack import CAPABILITIES
from flexgen_ray.kernels import pack as quantize
from flexgen_ray.kernels import pack_plain as plain
from flexgen_ray.kernels.mxfp4 import dequantize_plain
from flexgen_ray.quant.packing import GROUP, LARGEST, code_bytes, packed_bytes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)
# Triton asks when a kernel is made, so all of a process's are interpreted, or none.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process of its own")
compiled = pytest.mark.skipif(IS_INTERPRETED, reason="compiles")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ODD = (0.0, -0.0, 1e-40, -6e-8, 65504.0, LARGEST, -LARGEST, math.inf, -math.inf, math.nan)


@compiled
def test_the_interpreted_kernels_hold_their_laws():
    """In a process whose kernels are interpreted, the tests of this file and of test_paged_cuda."""
    pytest_options = ("-q", "--noconftest", "-p", "no:cacheprovider")
    files = (__file__, Path(__file__).with_name("test_paged_cuda.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *pytest_options, *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "28 passed" in done.stdout


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, places) -> Tensor:
    """An empty tensor of a shape somewhere in a larger one: dense in its last dimension, but the
    others in any order, with gaps between them. Starts and gaps are multiples of a step."""
    order, gaps, start, step = places
    order = [i for i in order if i < len(shape) - 1]
    room = [shape[i] + gap for i, gap in zip(order, gaps, strict=False)]
    start, length = start * step, shape[-1] + gaps[-1] * step
    memory = torch.zeros(start + math.prod(room) * length + start, dtype=dtype)
    whole = memory[start : memory.numel() - start].view(*room, length)
    whole = whole.permute(*[order.index(i) for i in range(len(order))], -1)
    return whole[tuple(slice(length) for length in shape)]


SIZES = (1, 2, 63, 64, 65, 80, 127, 128, 192, 200, 256)
shapes = st.tuples(
    st.lists(st.integers(0, 3), max_size=5).filter(lambda dims: math.prod(dims) <= 40),
    st.sampled_from(SIZES),
).map(lambda drawn: (*drawn[0], drawn[1]))
layouts = st.one_of(
    st.just((range(5), [0] * 6, 0, 1)),
    st.tuples(
        st.permutations(range(5)),
        st.lists(st.integers(0, 2), min_size=6, max_size=6),
        st.integers(0, 3),
        st.sampled_from([1, 2, 4, 8, 16]),
    ),
)


def fill(x: Tensor, magnitude: int, share_odd: float, seed: int) -> None:
    """Gaussian numbers of a size, some of them replaced by odd ones."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(x.shape, generator=random) * 2.0**magnitude
    odd = torch.tensor(ODD)[torch.randint(len(ODD), x.shape, generator=random)]
    is_odd = torch.rand(x.shape, generator=random) < share_odd
    x.copy_(torch.where(is_odd, odd, values))
    if x.dtype == torch.bfloat16:  # whose subnormal numbers the interpreter widens wrongly
        x[x.abs() < torch.finfo(x.dtype).smallest_normal] = 0


def one_nan(packed: Tensor, size: int, bits: int) -> Tensor:
    """Packed vectors in which every minimum that is no number is the same one."""
    middle = code_bytes(size, bits)
    codes, numbers = packed[..., :middle], packed[..., middle:]
    numbers = numbers.clone(memory_format=torch.contiguous_format).view(torch.float16)
    numbers[numbers.isnan()] = math.nan
    return torch.cat((codes, numbers.view(torch.uint8)), -1)


def taken(out: Tensor) -> Tensor:
    """What was written; nothing was beside it, where all is 7."""
    found = out.clone()
    out.fill_(7)
    assert (out._base == 7).all()
    return found


@interpreted
@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([4, 8]),
    places=st.tuples(layouts, layouts),
    fill_it=st.builds(
        partial,
        st.just(fill),
        magnitude=st.integers(-30, 16),
        share_odd=st.sampled_from([0, 0, 0.01, 0.3, 1]),
        seed=st.integers(0, 2**20),
    ),
)
def test_interpreted_kernels_equal_the_others_bit_for_bit(shape, dtype, bits, places, fill_it):
    from flexgen_ray.kernels import pack_cuda as cuda

    size, packed_shape = shape[-1], (*shape[:-1], packed_bytes(shape[-1], bits))
    x = laid_out(shape, dtype, places[0])
    fill_it(x)
    modules = (cuda, plain)
    outs = [laid_out(packed_shape, torch.uint8, places[1]) for _ in modules]
    for module, out in zip(modules, outs, strict=True):
        out._base.fill_(7)
        module.pack(x, bits, out)
    values = [laid_out(shape, dtype, places[0]) for _ in modules]
    for module, out in zip(modules, values, strict=True):
        out._base.fill_(7)
        module.unpack(outs[0], bits, out)
    exact = torch.empty(shape)
    plain.unpack(outs[0], bits, exact)
    packed = [one_nan(taken(out), size, bits) for out in outs]
    assert torch.equal(packed[0], packed[1])
    values = [taken(out).nan_to_num_(nan=-1.0) for out in values]
    if dtype == torch.bfloat16:
        # The interpreter cuts off what compiled code rounds (see below).
        cut_off = (exact.nan_to_num(nan=-1.0).view(torch.int32) & ~0xFFFF).view(torch.float32)
        assert torch.equal(values[0].float(), cut_off)
    else:
        assert torch.equal(values[0], values[1])


def cache(count: int, dtype: torch.dtype, tokens: int) -> Tensor:
    """Keys and values [2, rows, heads, tokens, count] of rows in the middle of a cache."""
    return torch.zeros(2, 5, 3, tokens + 3, count, dtype=dtype)[:, 1:4, :, :tokens]


@interpreted
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size, alignment", [(64, 4), (128, 8), (256, 16)])
def test_caches_are_unpacked_as_whole_groups(size, alignment, bits):
    """Rows of any bytes, also infinite and NaN, in a cache's layout."""
    from flexgen_ray.kernels import pack_cuda as cuda

    packed = cache(packed_bytes(size, bits), torch.uint8, 3)
    random = torch.Generator().manual_seed(size)
    packed._base.random_(generator=random)
    outs = [cache(size, torch.float16, 3) for _ in range(2)]
    assert cuda.whole_alignment(outs[0], packed) == alignment
    for module, out in zip((cuda, plain), outs, strict=True):
        module.unpack(packed, bits, out)
    assert 0 < outs[0].isnan().sum() < outs[0].numel() / 2
    values, expected = (out.nan_to_num(nan=-1.0) for out in outs)
    assert torch.equal(values, expected)


@interpreted
@settings(max_examples=100, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), places=st.tuples(layouts, layouts))
def test_whole_groups_are_those_at_aligned_addresses(shape, dtype, places):
    """The bytes between vectors, and from their start, are multiples of the alignment."""
    from flexgen_ray.kernels import pack_cuda as cuda

    values = laid_out(shape, dtype, places[0])
    packed = laid_out((*shape[:-1], packed_bytes(shape[-1], 4)), torch.uint8, places[1])
    of_values, of_packed = (
        [x[index].data_ptr() for index in product(*map(range, shape[:-1]))]
        for x in (values, packed)
    )
    alignment = cuda.whole_alignment(values, packed)
    if alignment:
        assert shape[-1] % GROUP == 0 and alignment in (4, 8, 16)
        assert not any(address % 16 for address in of_values)
        assert not any(address % alignment for address in of_packed)
    elif of_packed and shape[-1] % GROUP == 0:
        # Then one vector is not aligned; the first of several may be.
        assert any(it % 16 for it in of_values) or any(it % 4 for it in of_packed)


@interpreted
@pytest.mark.parametrize("bits", [4, 8])
def test_each_tie_goes_to_the_even_code(bits):
    """Values half way between two codes, of scale 1."""
    from flexgen_ray.kernels import pack_cuda as cuda

    levels = 2**bits - 1
    x = torch.arange(2 * levels + 1).float() / 2
    x = torch.cat((x, x.new_full((-len(x) % GROUP,), float(levels)))).view(-1, GROUP)
    x[:, 0], x[:, 1] = 0.0, levels
    packed, expected = (torch.zeros(len(x), packed_bytes(GROUP, bits)).byte() for _ in range(2))
    cuda.pack(x, bits, packed)
    plain.pack(x, bits, expected)
    assert torch.equal(packed, expected)
    out = torch.empty_like(x)
    cuda.unpack(packed, bits, out)
    assert torch.equal(out, x.round())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_of_every_byte_and_scale_equals_plain_torch(dtype):
    """At an even address and at an odd one; 272 groups are no whole number of programs."""
    from flexgen_ray.kernels import mxfp4_cuda as cuda

    scales = torch.arange(256, dtype=torch.uint8).repeat(2)[: 256 + 16]
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(17, 1)
    scales = torch.stack([scales.roll(turn) for turn in range(16)])
    memory = torch.zeros(16 * blocks.numel() + 1, dtype=torch.uint8)
    for start in (0, 1):
        there = memory[start:][: 16 * blocks.numel()].view(16, -1, 16).copy_(blocks)
        outs = [torch.zeros(16, 272, 32, dtype=dtype) for _ in range(2)]
        for dequantize, out in zip((cuda.dequantize, dequantize_plain), outs, strict=True):
            dequantize(there, scales, out)
        assert torch.equal(*(out.view(torch.uint8) for out in outs))


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_compiler_takes_mxfp4(capability, dtype):
    """Down to machine code, with wide moves where addresses allow; no number is flushed to zero."""
    for alignment in (16, 1):
        made = made_for_gpus.compiled_mxfp4(capability, dtype, alignment)
        assert made.asm["cubin"] and ".ftz" not in made.asm["ptx"]
        assert ("ld.global.v4.b32" in made.asm["ptx"]) == (alignment == 16)
        if alignment == 16 and made_for_gpus.disassembler() is not None:
            counts = made_for_gpus.instructions(made)
            units = made.src.constants[made.src.fn.arg_names.index("UNITS"),]
            assert sum(counts.values()) * 4 / (units * 32) <= 0.6  # of a warp a value


def test_kernels_are_used_where_they_can_be_made(caplog):
    """Interpreted they can on a CPU; compiled they can't, which a warning tells."""
    used = quantize._on_device.__wrapped__(torch.device("cpu"))
    assert used.__name__.endswith("cuda" if IS_INTERPRETED else "plain")
    assert ("python3-dev" in caplog.text) != IS_INTERPRETED


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["_pack", "_unpack"])
def test_the_compiler_takes_the_kernels(name, capability):
    """Down to machine code, with the arguments as it specialises them: strides of one, large ones,
    and multiples of 16. Rounding is IEEE's, and no number is flushed to zero."""
    variants = (
        (4, "fp16", None, {}, ()),
        (4, "bf16", (), {"v3": 1, "p3": 1}, ("v0",)),
        (8, "fp32", (), {"size": 1}, ("p0",)),
    )
    for bits, dtype, even, ones, wide in variants:
        case = {"capability": capability, "bits": bits, "dtype": dtype}
        made = made_for_gpus.compiled(name, case, even, ones, wide)
        check_code(made, dtype, capability, is_pack=name == "_pack")


def check_code(made, dtype: str, capability: int, is_pack: bool) -> None:
    """Machine code is there, and its arithmetic is IEEE's."""
    assert made.asm["cubin"] and ".ftz" not in made.asm["ptx"]
    assert ("div.rn.f32" in made.asm["ptx"]) == is_pack
    if dtype == "bf16" and not is_pack and capability >= 80:
        assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", made.asm["ptx"])


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "bits, dtype, alignment, is_dense, load",
    [(4, "fp16", 16, True, "128"), (4, "bf16", 8, False, "64"), (8, "fp32", 16, True, "128")],
)
def test_whole_groups_take_wide_moves_and_few_instructions(
    capability, bits, dtype, alignment, is_dense, load
):
    """Four bits at most 0.6 instructions of a warp a value; a quarter of what others take."""
    case = {"capability": capability, "bits": bits, "dtype": dtype}
    made = made_for_gpus.compiled_whole(case, alignment, is_dense)
    check_code(made, dtype, capability, is_pack=False)
    if made_for_gpus.disassembler() is None:
        pytest.skip("needs NVIDIA's disassembler, which comes with Triton")
    counts = made_for_gpus.instructions(made)
    assert made_for_gpus.a_value(made, counts) <= 0.6
    moves = {it.removesuffix(".SYS") for it in counts if it.startswith(("LDG", "STG"))}
    assert moves == {f"LDG.E.{load}", "LDG.E", "STG.E.128"}


@compiled
def test_kernels_know_no_number_that_changes_from_pass_to_pass():
    """Triton would compile anew for numbers that are 1 or a multiple of 16."""
    from flexgen_ray.kernels import pack_cuda as cuda

    for kernel in (cuda._pack, cuda._unpack, cuda._unpack_whole):
        unknown = {it.name for it in kernel.params if it.do_not_specialize}
        assert {"total", "n1", "n2", "n3"} <= unknown
