"""Triton's kernels without a GPU: by its interpreter they give the bits of the others, and its
compiler takes them for every generation of GPUs. Skipped where Triton isn't installed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_ray.kernels import pack as quantize
from flexgen_ray.kernels import pack_host as host
from flexgen_ray.kernels import pack_plain as plain
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
    """Those below, in a process whose kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, places) -> Tensor:
    """An empty tensor of a shape somewhere in a larger one: dense in its last dimension, but the
    others in any order, with gaps between them."""
    order, gaps, start = places
    order = [i for i in order if i < len(shape) - 1]
    room = [shape[i] + gap for i, gap in zip(order, gaps, strict=False)]
    memory = torch.zeros(start + math.prod(room) * (shape[-1] + gaps[-1]) + start, dtype=dtype)
    whole = memory[start : memory.numel() - start].view(*room, shape[-1] + gaps[-1])
    whole = whole.permute(*[order.index(i) for i in range(len(order))], -1)
    return whole[tuple(slice(length) for length in shape)]


shapes = st.lists(st.integers(0, 3), max_size=5).flatmap(
    lambda dims: st.sampled_from([1, 2, 63, 64, 65, 80, 127, 128, 200]).map(
        lambda size: (*dims, size)
    )
)
layouts = st.tuples(
    st.permutations(range(5)),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
    st.integers(0, 3),
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
    modules = (cuda, host, plain)
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
    assert torch.equal(packed[0], packed[2]) and torch.equal(packed[1], packed[2])
    values = [taken(out).nan_to_num_(nan=-1.0) for out in values]
    assert torch.equal(values[1], values[2])
    if dtype == torch.bfloat16:
        # The interpreter cuts off what compiled code rounds (see below).
        cut_off = (exact.nan_to_num(nan=-1.0).view(torch.int32) & ~0xFFFF).view(torch.float32)
        assert torch.equal(values[0].float(), cut_off)
    else:
        assert torch.equal(values[0], values[2])


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


def test_kernels_are_used_where_they_can_be_made(caplog):
    """Interpreted they can on a CPU; compiled they can't, which a warning tells."""
    used = quantize._on_device.__wrapped__(torch.device("cpu"))
    assert used.__name__.endswith("cuda" if IS_INTERPRETED else "plain")
    assert ("python3-dev" in caplog.text) != IS_INTERPRETED


COUNTS = ("total", "n1", "n2", "n3")


@compiled
@pytest.mark.parametrize("capability", [75, 80, 90])
@pytest.mark.parametrize("name", ["_pack", "_unpack"])
def test_the_compiler_takes_the_kernels(name, capability, tmp_path, monkeypatch):
    """Down to machine code, with the arguments as it specialises them: strides of one, large ones,
    and multiples of 16. Rounding is IEEE's, and no number is flushed to zero."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flexgen_ray.kernels import pack_cuda as cuda

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(cuda, name)
    args = kernel.arg_names
    constants = {"LARGEST": LARGEST, "GROUP": GROUP, "UNITS": 32}
    numbers = [arg for arg in args[2:] if arg not in constants and arg != "BITS"]
    assert all(kernel.params[args.index(arg)].do_not_specialize for arg in COUNTS)
    even = {arg: [["tt.divisibility", 16]] for arg in args if arg not in (*constants, *COUNTS)}
    variants = (
        (4, "fp16", {}, {}, even),
        (4, "bf16", {"v3": 1, "p3": 1}, {"v0": "i64"}, {}),
        (8, "fp32", {"size": 1}, {"p0": "i64"}, {}),
    )
    for bits, dtype, ones, wide, attributes in variants:
        constexprs = constants | {"BITS": bits} | ones
        signature = {"values": f"*{dtype}", "packed": "*u8"} | dict.fromkeys(numbers, "i32") | wide
        signature |= dict.fromkeys(constexprs, "constexpr")
        attrs = {(args.index(arg),): it for arg, it in attributes.items() if arg in signature}
        attrs = {place: it for place, it in attrs.items() if args[place[0]] not in constexprs}
        source = ASTSource(kernel, {arg: signature[arg] for arg in args}, constexprs, attrs)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"] and ".ftz" not in made.asm["ptx"]
        assert ("div.rn.f32" in made.asm["ptx"]) == (name == "_pack")
        if dtype == "bf16" and name == "_unpack" and capability >= 80:
            assert "cvt.rn.bf16.f32" in made.asm["ptx"]
