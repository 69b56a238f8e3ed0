"""Packed vectors (quant/): the layout byte by byte, the error of every value, equal bits."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.rounding import searched
from flexgen_ray.kernels import pack_host as host
from flexgen_ray.kernels import pack_plain as plain
from flexgen_ray.kernels.pack import pack, unpack
from flexgen_ray.quant.packing import GROUP, LARGEST, num_groups, packed_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = torch.finfo(torch.float16)
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def make_values(rows, size, dtype, magnitude, offset, constant, seed) -> Tensor:
    """Gaussian, in units of the magnitude, around an offset; or each group all alike."""
    random = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, size, generator=random) + offset) * 2.0**magnitude
    if constant:
        values = values[:, ::GROUP].repeat_interleave(GROUP, 1)[:, :size]
    return values.clamp(-LARGEST, LARGEST).to(dtype).clamp(-LARGEST + 512, LARGEST - 512)


values = st.builds(
    make_values,
    rows=st.integers(1, 3),
    size=st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 192, 576])),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    magnitude=st.integers(-30, 16),
    offset=st.sampled_from([0.0, 0.0, 3.0, -1000.0]),
    constant=st.booleans(),
    seed=st.integers(0, 2**20),
)
bits = st.sampled_from([4, 8])


def unpacked(packed: Tensor, bits: int, size: int, dtype=torch.float32) -> Tensor:
    out = torch.full((*packed.shape[:-1], size), math.nan, dtype=dtype)
    unpack(packed, bits, out)
    return out


def read(packed: bytes, bits: int, size: int) -> list[float]:
    """One vector as the format says, byte by byte."""
    lengths = [min(GROUP, size - first) for first in range(0, size, GROUP)]
    codes, place = [], 0
    for n in lengths:
        half = (n + 1) // 2
        taken = packed[place : place + (n if bits == 8 else half)]
        place += len(taken)
        codes.append(taken if bits == 8 else [c & 15 for c in taken] + [c >> 4 for c in taken])
    place += place % 2
    numbers = struct.iter_unpack("<2e", packed[place:])
    return [
        float(np.float32(minimum + code * scale))
        for n, group, (minimum, scale) in zip(lengths, codes, numbers, strict=True)
        for code in group[:n]
    ]


def parameters(packed: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each value's minimum and scale, float64 [..., size]."""
    numbers = packed[..., -4 * num_groups(size) :].contiguous().view(torch.float16).double()
    of_values = numbers.unflatten(-1, (-1, 2)).repeat_interleave(GROUP, -2)[..., :size, :]
    return of_values[..., 0], of_values[..., 1]


def spans(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each value's group, float64."""
    filled = num_groups(x.shape[-1]) * GROUP - x.shape[-1]
    last = x[..., -1:].double()
    if filled:  # with a value of the last group
        x = torch.cat((x.double(), last.expand(*x.shape[:-1], filled)), -1)
    groups = x.double().unflatten(-1, (-1, GROUP))
    size = x.shape[-1] - filled
    return tuple(
        end.repeat_interleave(GROUP, -1)[..., :size] for end in (groups.amin(-1), groups.amax(-1))
    )


@pytest.mark.parametrize(
    "size, bits, nbytes", [(64, 4, 36), (128, 4, 72), (64, 8, 68), (1, 4, 6), (67, 8, 76)]
)
def test_a_packed_vector_has_the_formats_size(size, bits, nbytes):
    assert packed_bytes(size, bits) == nbytes


@given(x=values, bits=bits)
def test_a_packed_vector_is_read_as_the_format_says(x, bits):
    packed = pack(x, bits)
    expected = [read(bytes(row.tolist()), bits, x.shape[1]) for row in packed]
    assert unpacked(packed, bits, x.shape[1]).tolist() == expected


@given(x=values, bits=bits, dtype=st.sampled_from(DTYPES))
def test_no_value_is_off_by_more_than_half_a_scale_and_what_rounding_adds(x, bits, dtype):
    size, levels = x.shape[1], 2**bits - 1
    packed = pack(x, bits)
    (low, high), (minimum, scale) = spans(x), parameters(packed, size)
    minimum_off = (low.abs() * 2.0**-11).clamp(min=HALF.smallest_normal * 2.0**-11)
    assert ((minimum - low).abs() <= minimum_off).all()
    exact = ((high - low + minimum_off) / levels).clamp(min=0)
    step = (exact * HALF.eps).clamp(min=HALF.smallest_normal * HALF.eps)
    assert (scale <= exact * (1 + 2.0**-22) + step).all()
    # Values below a minimum that was rounded up have its code; others the nearest.
    float32 = 2.0**-22 * torch.maximum(low.abs(), high.abs())
    bound = torch.maximum(scale / 2, minimum_off) + float32
    found = unpacked(packed, bits, size, dtype).double()
    tiny = torch.finfo(dtype).smallest_normal
    target = ROUNDING[dtype] * (x.double().abs() + bound).clamp(min=tiny)
    assert ((found - x.double()).abs() <= bound + target).all()


@given(x=values, bits=bits, dtype=st.sampled_from(DTYPES))
def test_a_dtype_only_rounds_what_float32_holds(x, bits, dtype):
    packed = pack(x, bits)
    exact = unpacked(packed, bits, x.shape[1])
    assert torch.equal(unpacked(packed, bits, x.shape[1], dtype), exact.to(dtype))


@given(x=values, bits=bits, dtype=st.sampled_from(DTYPES))
def test_the_cpus_vectors_equal_plain_torch_bit_for_bit(x, bits, dtype):
    packed = pack(x, bits)
    by_torch = torch.full_like(packed, 7)
    plain.pack(x, bits, by_torch)
    assert torch.equal(packed, by_torch)
    values = torch.empty(x.shape, dtype=dtype)
    plain.unpack(packed, bits, values)
    assert torch.equal(unpacked(packed, bits, x.shape[1], dtype), values)


@given(x=values, bits=bits, number=st.sampled_from([math.nan, math.inf, -65504.0]), data=st.data())
def test_a_group_beyond_float16_becomes_nan_and_no_other(x, bits, number, data):
    """As CUDA has it, which can't wait to refuse it."""
    x = x.float()
    good = pack(x, bits)
    row, place = (data.draw(st.integers(0, n - 1)) for n in x.shape)
    x[row, place] = number
    packed, by_torch = torch.empty_like(good), torch.empty_like(good)
    assert not host.pack(x, bits, packed)
    plain.pack(x, bits, by_torch)
    expected = unpacked(good, bits, x.shape[1])
    expected[row, place // GROUP * GROUP :][:GROUP] = math.nan
    for dtype in DTYPES:
        for tried in (packed, by_torch):
            found = unpacked(tried, bits, x.shape[1], dtype)
            assert torch.equal(found.nan_to_num(-1), expected.to(dtype).nan_to_num(-1))


@given(signs=st.lists(st.booleans(), min_size=1, max_size=70), bits=bits)
@example(signs=[False] * 70, bits=4)
def test_a_zeros_sign_changes_no_byte(signs, bits):
    """Which of them is the least depends on the order of a reduction."""
    x = torch.zeros(len(signs)).where(torch.tensor(signs), -0.0)
    assert torch.equal(pack(x, bits), pack(torch.zeros(len(signs)), bits))


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    x = torch.randn(37, 100, generator=torch.Generator().manual_seed(0))
    packed = pack(x, 4)
    alone = unpacked(packed, 4, 100)
    before = torch.get_num_threads()
    monkeypatch.setattr(host, "_VALUES_PER_THREAD", 100)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(pack(x, 4), packed)
            assert torch.equal(unpacked(packed, 4, 100), alone)
            x[36, 99], kept = math.nan, x[36, 99].clone()
            with pytest.raises(ValueError, match="65376"):
                pack(x, 4)
            x[36, 99] = kept
    finally:
        torch.set_num_threads(before)


ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@ON_CUDA
@given(x=values, bits=bits, dtype=st.sampled_from(DTYPES), far=st.integers(0, 3))
def test_cuda_equals_the_cpu_bit_for_bit(x, bits, dtype, far):
    """At any address, in rows and between them, with one dimension before a vector's or five."""
    rows, size = x.shape
    x = torch.stack((x, x.flip(0)), 1)
    packed = pack(x, bits)
    large = torch.full((rows, 2, packed.shape[-1] + 3), 7, dtype=torch.uint8, device="cuda")
    place = large[..., far : far + packed.shape[-1]]
    assert pack(x.cuda(), bits, out=place) is place
    assert torch.equal(place.cpu(), packed)
    assert large.sum() == place.sum() + 7 * (large.numel() - place.numel())
    expected = unpacked(packed, bits, size, dtype)
    out = torch.zeros((rows, 2, size + 1), dtype=dtype, device="cuda")
    unpack(place, bits, out[..., 1:])
    assert torch.equal(out[..., 1:].cpu(), expected) and not out[..., 0].any()
    for shape in ((1, 1, rows, 1, 2), (2 * rows,)):
        out = torch.zeros((*shape, size), dtype=dtype, device="cuda")
        unpack(place.contiguous().view(*shape, -1), bits, out)
        assert torch.equal(out.view(rows, 2, size).cpu(), expected)


@pytest.mark.gpu
@ON_CUDA
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("number", [math.nan, math.inf, -65504.0])
def test_on_cuda_a_group_beyond_float16_becomes_nan_and_no_other(bits, number):
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    expected = unpacked(pack(x, bits), bits, 200)
    x[1, 70], expected[1, 64:128] = number, math.nan
    for dtype in DTYPES:
        out = torch.zeros((3, 200), dtype=dtype, device="cuda")
        unpack(pack(x.cuda(), bits), bits, out)
        assert torch.equal(out.cpu().nan_to_num(-1), expected.to(dtype).nan_to_num(-1))
    with pytest.raises(ValueError, match="pack there"):
        pack(torch.ones(1, 64, device="cuda"), bits, least_squares=True)


@given(x=values, bits=bits)
def test_what_was_unpacked_packs_to_the_same_bytes_in_groups_around_zero(x, bits):
    """There the extremes are kept: their codes occur, if scales aren't subnormal."""
    packed = pack(x, bits)
    low, high = spans(x)
    _, scale = parameters(packed, x.shape[1])
    assume(((low <= 0) & (high >= 0) & (scale >= HALF.smallest_normal)).all())
    assert torch.equal(pack(unpacked(packed, bits, x.shape[1]), bits), packed)


@given(number=st.floats(-LARGEST, LARGEST, width=16), bits=bits, size=st.integers(1, 130))
@example(number=-0.0, bits=4, size=65)
def test_float16_groups_of_one_value_come_back_exactly(number, bits, size):
    x = torch.full((size,), number)
    assert torch.equal(unpacked(pack(x, bits), bits, size), x)


@given(x=values, bits=bits, seed=st.integers(0, 99))
def test_vectors_lie_anywhere_and_are_packed_by_themselves(x, bits, seed):
    """Into and out of rows of a larger array, in another order, at odd addresses."""
    rows, size = x.shape
    nbytes, whole = packed_bytes(size, bits), pack(x, bits)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    large = torch.full((rows, 3, nbytes + 3), 7, dtype=torch.uint8)
    place = large[:, 1, 1 : nbytes + 1]
    given = torch.stack((x, -x), 1)[order, 0]
    assert pack(given.mT.contiguous().mT, bits, out=place) is place
    assert torch.equal(place, whole[order])
    assert large.sum() == place.sum() + 7 * (large.numel() - place.numel())
    out = torch.zeros(rows, 2, size + 1)
    unpack(place, bits, out[:, 1, 1:])
    assert torch.equal(out[:, 1, 1:], unpacked(whole[order], bits, size))
    assert not out[:, 0].any() and not out[:, 1, 0].any()


def squared_errors(x: Tensor, packed: Tensor, bits: int) -> Tensor:
    """Of each whole group."""
    found = unpacked(packed, bits, x.shape[-1]).double() - x.double()
    whole = x.shape[-1] // GROUP * GROUP
    return found[..., :whole].unflatten(-1, (-1, GROUP)).square().sum(-1)


@given(x=values, bits=bits)
def test_least_squares_make_no_group_worse_and_no_value_infinite(x, bits):
    plainly, searched = pack(x, bits), pack(x, bits, least_squares=True)
    if x.shape[1] >= GROUP:
        before, after = (squared_errors(x, it, bits) for it in (plainly, searched))
        float32 = GROUP * (2.0**-22 * x.double().abs().max()) ** 2
        assert (after <= before * (1 + 1e-4) + float32).all()
    assert unpacked(searched, bits, x.shape[1], torch.float16).isfinite().all()
    rest = x.shape[1] // GROUP * GROUP
    ends = (unpacked(it, bits, x.shape[1])[:, rest:] for it in (plainly, searched))
    assert torch.equal(*ends)


@pytest.mark.parametrize("bits, gain", [(4, 0.14), (8, 0.08)])
@pytest.mark.parametrize("magnitude", [-7, 0, 13])
def test_least_squares_leave_gaussian_weights_less_error(bits, gain, magnitude):
    x = make_values(50, 640, torch.float32, magnitude, 0.0, False, seed=0)
    before, after = (
        squared_errors(x, pack(x, bits, least_squares=it), bits).sum() for it in (False, True)
    )
    assert after <= (1 - gain) * before


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_least_squares_are_those_of_the_same_search_in_plain_torch(bits, dtype):
    """Lines differ where float32 sums do, which turns few codes and hardly an error."""
    x = make_values(30, 600, dtype, -5, 0.3, False, seed=1)
    found = unpacked(pack(x, bits, least_squares=True), bits, 600).double() - x.double()
    wanted = searched(x.float(), bits).double() - x.double()
    assert found.square().sum() == pytest.approx(wanted.square().sum().item(), rel=0.01)
    assert torch.equal(found[:, -24:], wanted[:, -24:])


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 65504.0, -1e30])
@pytest.mark.parametrize("place", [0, 70, 129])
def test_what_float16_cannot_hold_is_refused(number, place):
    x = torch.ones(2, 130, dtype=torch.float64)
    x[1, place] = number
    with pytest.raises(ValueError, match="65376"):
        pack(x, 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_values_stay_finite_in_every_dtype(bits):
    x = torch.tensor([[-LARGEST, LARGEST, 0.0], [LARGEST - 9, LARGEST, LARGEST]])
    for dtype in DTYPES:
        assert unpacked(pack(x, bits), bits, 3, dtype).isfinite().all()


def test_what_does_not_fit_together_is_refused():
    packed = pack(torch.ones(2, 64), 4)
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        packed_bytes(64, 3)
    with pytest.raises(ValueError, match=r"\[2, 36\]"):
        pack(torch.ones(2, 64), 4, out=torch.empty(2, 68, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[2, 42\]"):
        unpack(packed, 4, torch.empty(2, 65))
    with pytest.raises(ValueError, match="on meta"):
        pack(torch.ones(2, 64), 4, out=torch.empty(2, 36, dtype=torch.uint8, device="meta"))
    with pytest.raises(ValueError, match="on meta"):
        unpack(packed, 4, torch.empty(2, 64, device="meta"))
    with pytest.raises(ValueError, match="dense"):
        unpack(packed.T.contiguous().T, 4, torch.empty(2, 64))
    with pytest.raises(ValueError, match="dense"):
        unpack(packed, 4, torch.empty(64, 2).T)
    with pytest.raises(ValueError, match="float64"):
        unpack(packed, 4, torch.empty(2, 64, dtype=torch.float64))
