"""MXFP4 (quant/mxfp4.py): the values are transformers', on every device and wherever they lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flexgen_ray.kernels import mxfp4_host as host
from flexgen_ray.kernels.dequantize import dequantize, tensors_of
from flexgen_ray.kernels.mxfp4 import dequantize_plain
from flexgen_ray.quant.mxfp4 import Mxfp4

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORM = Mxfp4()


def random_bytes(shape: tuple[int, ...], seed: int) -> Tensor:
    """Stored bytes of random codes and scales."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, FORM.stored_shape(shape), dtype=torch.uint8, generator=generator)


def every_group() -> tuple[Tensor, Tensor]:
    """Blocks [256, 16, 16] and scales [256, 16]: each byte with each scale."""
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(256, 16, 16).contiguous()
    return blocks, torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(integer), expected.contiguous().view(integer))


def test_every_byte_with_every_scale_is_what_transformers_makes_of_it():
    blocks, scales = every_group()
    expected = convert_moe_packed_tensors(blocks[:, None], scales[:, None])[..., 0]
    stored = torch.empty(FORM.stored_shape((256, 1, 512)), dtype=torch.uint8)
    for view, values in zip(tensors_of(stored, FORM, (256, 1, 512)).values(), (blocks, scales),
                            strict=True):  # fmt: skip
        view.copy_(values[:, None])
    out = torch.empty(256, 1, 512, dtype=torch.bfloat16)
    dequantize(stored, FORM, out)
    assert_same_bits(out[:, 0], expected)
    # What bfloat16 holds, float32 holds, too.
    exact = torch.empty(256, 1, 512)
    dequantize(stored, FORM, exact)
    assert_same_bits(exact[:, 0], expected.float())


@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
def test_the_cpus_vectors_equal_plain_torch_bit_for_bit(experts, rows, groups, dtype, seed):
    """Also of some experts among others."""
    shape = (experts + 1, rows, 32 * groups)
    stored = random_bytes(shape, seed)
    expected = torch.empty(shape, dtype=dtype)
    blocks, scales = tensors_of(stored, FORM, shape).values()
    flat = blocks.flatten(1, 2), scales.flatten(1), expected.view(experts + 1, -1, 32)
    dequantize_plain(*flat)
    for out in (torch.empty_like(expected), torch.empty_like(expected)[1:]):
        dequantize(stored[-len(out) :], FORM, out)
        assert_same_bits(out, expected[-len(out) :])


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    shape, before = (3, 37, 96), torch.get_num_threads()
    stored, outs = random_bytes(shape, 0), []
    monkeypatch.setattr(host, "_GROUPS_PER_THREAD", 20)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(torch.empty(shape))
            dequantize(stored, FORM, outs[-1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_value_takes_four_and_a_quarter_bits():
    assert FORM.stored_shape((5, 6, 64)) == (5, 6 * 2 * 17)
    assert FORM.tensors((5, 6, 64)) == {"_blocks": (5, 6, 2, 16), "_scales": (5, 6, 2)}


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="groups of 32 values, which 80 columns"):
        FORM.stored_shape((6, 80))
    with pytest.raises(ValueError, match=r"MXFP4 take bytes of the shape \[2, 34\]"):
        dequantize(torch.zeros(2, 35, dtype=torch.uint8), FORM, torch.empty(2, 1, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    far=st.integers(0, 3),
)
def test_cuda_equals_the_cpu_bit_for_bit(rows, groups, dtype, far):
    """At any address, also with every byte and scale."""
    shape = (3, rows, 32 * groups)
    stored, expected = random_bytes(shape, rows), torch.empty(shape, dtype=dtype)
    dequantize(stored, FORM, expected)
    place = torch.zeros(stored.numel() + far, dtype=torch.uint8, device="cuda")[far:]
    place = place.view(stored.shape).copy_(stored)
    out = torch.empty(shape, dtype=dtype, device="cuda")
    dequantize(place, FORM, out)
    assert_same_bits(out.cpu(), expected)
