"""Rotary position embedding of queries and keys (Su et al. 2021), over tensors."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flexgen_ray.models.rope import Rope


def rotation(rope: Rope, positions: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines of rotary position embedding for some positions.

    positions: [tokens]. Returns [2, tokens, 1, rotated pairs], half a head's elements or fewer.
    """
    angles = positions[:, None].float() * _frequencies(rope, head_dim, positions.device)
    both = torch.stack((angles.cos(), angles.sin()))
    if rope.attention_factor != 1:
        both *= rope.attention_factor
    return both.to(dtype)[:, :, None]


def rotate(rotation: Tensor, x: Tensor, out: Tensor) -> None:
    """Rotate x, [tokens, heads, head_dim], with Hugging Face's order of halves, into out.

    Elements of a head beyond the rotated ones are copied.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    size = 2 * half
    if size < x.shape[-1]:
        out[..., size:].copy_(x[..., size:])
        x, out = x[..., :size], out[..., :size]
    torch.mul(x.unflatten(-1, (2, half)), cos[..., None, :], out=out.unflatten(-1, (2, half)))
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)


@lru_cache(maxsize=32)
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Return the rotation per position in radians, [rotated elements / 2]."""
    size = rope.rotated_size(head_dim)
    periods = rope.theta ** (torch.arange(0, size, 2, dtype=torch.float) / size)
    frequencies = 1.0 / periods
    if rope.type == "linear":
        frequencies = frequencies / rope.factor
    elif rope.type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        turns = rope.original_max_seq_len / wavelengths
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    elif rope.type == "yarn":
        plain = 1 - _yarn_ramp(rope, size)
        frequencies = 1.0 / (rope.factor * periods) * (1 - plain) + frequencies * plain
    elif rope.type == "longrope":
        factors = rope.long_factors if rope.is_long else rope.short_factors
        frequencies = 1.0 / (torch.tensor(factors, dtype=torch.float) * periods)
    return frequencies.to(device)


def _yarn_ramp(rope: Rope, size: int) -> Tensor:
    """Return how far each frequency is scaled, from 0 for fast to 1 for slow ones, [size / 2]."""

    def place(turns: float) -> float:
        """The frequency's number, not a whole one, that turns so often in the original context."""
        period = rope.original_max_seq_len / (turns * 2 * math.pi)
        return size * math.log(period) / (2 * math.log(rope.theta))

    first, last = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    last += 0.001 * (first == last)
    return ((torch.arange(size // 2, dtype=torch.float) - first) / (last - first)).clamp(0, 1)
