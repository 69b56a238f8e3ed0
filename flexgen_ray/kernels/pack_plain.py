"""Quantization in plain torch, on any device: the reference that faster code equals bit for bit.

Takes several passes over memory, and float32 copies of its input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flexgen_ray.quant.packing import (
    GROUP,
    LARGEST,
    PARAMETER_BYTES,
    code_bytes,
    group_bytes,
    num_groups,
)


def pack(x: Tensor, bits: int, out: Tensor) -> None:
    """Quantize vectors into out; a group with a value beyond LARGEST becomes NaN."""
    values, size = x.float(), x.shape[-1]
    codes, parameters = _split(out, size, bits)
    codes[..., -1] = 0
    for vectors, places, groups in _blocks(size, bits):
        block = values[..., vectors].unflatten(-1, (groups.stop - groups.start, -1))
        minimum, scale = _range(block, bits)
        nearest = _nearest(block, minimum, scale, bits)
        codes[..., places] = _join_codes(nearest, bits).flatten(-2)
        pairs = torch.stack((minimum, scale), -1).half().view(torch.uint8)
        first, end = (PARAMETER_BYTES * i for i in (groups.start, groups.stop))
        parameters[..., first:end] = pairs.flatten(-2)


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """Dequantize vectors into out, rounded to its dtype."""
    size = out.shape[-1]
    codes, parameters = _split(packed, size, bits)
    # The copy is aligned, as a view of float16 must be; the vectors may not be.
    pairs = parameters.clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    minimum, scale = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    for vectors, places, groups in _blocks(size, bits):
        block = codes[..., places].unflatten(-1, (groups.stop - groups.start, -1))
        scaled = _split_codes(block, vectors, groups, bits) * scale[..., groups, None]
        out[..., vectors] = scaled.add_(minimum[..., groups, None]).flatten(-2)


def _split(packed: Tensor, size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Bytes of the codes, and bytes of minimums and scales."""
    middle = code_bytes(size, bits)
    return packed[..., :middle], packed[..., middle:]


def _blocks(size: int, bits: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices (of values, of bytes of codes, of groups): whole groups, then the shorter last one."""
    whole = size // GROUP
    middle, places = whole * GROUP, whole * group_bytes(GROUP, bits)
    if whole:
        yield slice(0, middle), slice(0, places), slice(0, whole)
    if middle < size:
        end = places + group_bytes(size - middle, bits)
        yield slice(middle, size), slice(places, end), slice(whole, num_groups(size))


def _range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Minimum and scale of groups [..., n], as float32 that float16 can hold.

    They are NaN and 0 for groups with a value that isn't finite or is beyond LARGEST.
    """
    low, high = x.aminmax(dim=-1)
    valid = (low >= -LARGEST) & (high <= LARGEST)
    # Added to zero, since -0.0 has other bytes than 0.0.
    minimum = low.where(valid, torch.nan).half().float() + 0.0
    return minimum, _covering((high - minimum).where(valid, 0.0), bits)


def _covering(span: Tensor, bits: int) -> Tensor:
    """Smallest float16 scale with which the highest code reaches the span, as float32."""
    levels = 2**bits - 1
    # CUDA and CPU divide a tensor by a number differently, so it is multiplied, and a scale that
    # rounding made too small is raised by one step.
    scale = ((span.clamp(min=0) + 0.0) * (1 / levels)).half()
    short = scale.float() * levels < span
    return (scale.view(torch.int16) + short).view(torch.float16).float()


def _nearest(x: Tensor, minimum: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of groups [..., n], uint8; zeros where the minimum is NaN."""
    divisor = scale.where(scale > 0, 1.0)
    steps = (x - minimum[..., None]).div_(divisor[..., None]).round_()
    return steps.nan_to_num_(0.0).clamp_(0, 2**bits - 1).to(torch.uint8)


def _join_codes(codes: Tensor, bits: int) -> Tensor:
    """Bytes [..., group_bytes(n, bits)] that hold a group's codes [..., n]."""
    if bits == 8:
        return codes
    half = group_bytes(codes.shape[-1], bits)
    squeezed = codes[..., :half].clone()
    squeezed[..., : codes.shape[-1] - half] |= codes[..., half:] << 4
    return squeezed


def _split_codes(block: Tensor, vectors: slice, groups: slice, bits: int) -> Tensor:
    """Codes [..., groups, n] as float32, from the bytes that hold them."""
    if bits == 8:
        return block.float()
    values = (vectors.stop - vectors.start) // (groups.stop - groups.start)
    return torch.cat((block & 15, block >> 4), -1)[..., :values].float()
