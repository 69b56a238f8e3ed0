"""Packing and unpacking in plain torch, on any device: what faster code must equal bit for bit.

Takes several passes over memory, and float32 copies of what it is given.
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
    values, size = x.float(), x.shape[-1]
    codes, parameters = _split(out, size, bits)
    codes[..., -1] = 0
    for vectors, places, groups in _blocks(size, bits):
        block = values[..., vectors].unflatten(-1, (groups.stop - groups.start, -1))
        minimum, scale = _range(block, bits)
        nearest = _nearest(block, minimum, scale, bits)
        codes[..., places] = _squeezed(nearest, bits).flatten(-2)
        pairs = torch.stack((minimum, scale), -1).half().view(torch.uint8)
        first, end = (PARAMETER_BYTES * i for i in (groups.start, groups.stop))
        parameters[..., first:end] = pairs.flatten(-2)


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    size = out.shape[-1]
    codes, parameters = _split(packed, size, bits)
    # A copy is aligned, wherever the vectors lie.
    pairs = parameters.clone(memory_format=torch.contiguous_format).view(torch.float16).float()
    minimum, scale = pairs.unflatten(-1, (-1, 2)).unbind(-1)
    for vectors, places, groups in _blocks(size, bits):
        block = codes[..., places].unflatten(-1, (groups.stop - groups.start, -1))
        spread = _spread(block, vectors, groups, bits) * scale[..., groups, None]
        out[..., vectors] = spread.add_(minimum[..., groups, None]).flatten(-2)


def _split(packed: Tensor, size: int, bits: int) -> tuple[Tensor, Tensor]:
    """The bytes of the codes, and those of minimums and scales."""
    middle = code_bytes(size, bits)
    return packed[..., :middle], packed[..., middle:]


def _blocks(size: int, bits: int) -> Iterator[tuple[slice, slice, slice]]:
    """Whole groups, then a shorter one: which values, which bytes of the codes, which groups."""
    whole = size // GROUP
    middle, places = whole * GROUP, whole * group_bytes(GROUP, bits)
    if whole:
        yield slice(0, middle), slice(0, places), slice(0, whole)
    if middle < size:
        end = places + group_bytes(size - middle, bits)
        yield slice(middle, size), slice(places, end), slice(whole, num_groups(size))


def _range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Minimum and scale of groups [..., n], as float32 that are float16 too; NaN and 0 of those
    with a value that isn't finite or beyond LARGEST."""
    low, high = x.aminmax(dim=-1)
    valid = (low >= -LARGEST) & (high <= LARGEST)
    # Added to zero, since -0.0 would be packed as another byte than 0.0.
    minimum = low.where(valid, torch.nan).half().float() + 0.0
    return minimum, _covering((high - minimum).where(valid, 0.0), bits)


def _covering(span: Tensor, bits: int) -> Tensor:
    """The smallest float16 scale with which the highest code reaches the span, as float32."""
    levels = 2**bits - 1
    # A CUDA tensor is divided by a number in another way than a CPU's; this way is corrected.
    scale = ((span.clamp(min=0) + 0.0) * (1 / levels)).half()
    short = scale.float() * levels < span
    return (scale.view(torch.int16) + short).view(torch.float16).float()


def _nearest(x: Tensor, minimum: Tensor, scale: Tensor, bits: int) -> Tensor:
    """uint8 codes of groups [..., n]; zeros where there is no minimum."""
    divisor = scale.where(scale > 0, 1.0)
    steps = (x - minimum[..., None]).div_(divisor[..., None]).round_()
    return steps.nan_to_num_(0.0).clamp_(0, 2**bits - 1).to(torch.uint8)


def _squeezed(codes: Tensor, bits: int) -> Tensor:
    """The bytes [..., group_bytes(n, bits)] of a group's codes [..., n]."""
    if bits == 8:
        return codes
    half = group_bytes(codes.shape[-1], bits)
    squeezed = codes[..., :half].clone()
    squeezed[..., : codes.shape[-1] - half] |= codes[..., half:] << 4
    return squeezed


def _spread(block: Tensor, vectors: slice, groups: slice, bits: int) -> Tensor:
    """The codes [..., groups, n] as float32."""
    if bits == 8:
        return block.float()
    values = (vectors.stop - vectors.start) // (groups.stop - groups.start)
    return torch.cat((block & 15, block >> 4), -1)[..., :values].float()
