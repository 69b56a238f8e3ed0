"""Where a packed vector's codes, minimums and scales lie: 4 or 8 bits a value, in groups of 64.

Group-wise asymmetric quantization (FlexGen, Sheng et al. 2023, section 5). A vector is packed by
itself: the codes of all groups, one after the other, filled up to an even number of bytes; then
for each group its (minimum, scale) as two float16. The last group may be shorter. A group of n
values has n bytes of codes with 8 bits, and with 4 bits half as many, rounded up: byte i holds
value i in its low nibble and value i + ceil(n / 2) in its high one, so that vector units unpack
without shuffling. Knows bytes, neither tensors nor values.
"""

from __future__ import annotations

GROUP = 64
PARAMETER_BYTES = 4


def packed_bytes(size: int, bits: int) -> int:
    """Of a vector of so many values, always even; ValueError unless bits are 4 or 8."""
    return code_bytes(size, bits) + num_groups(size) * PARAMETER_BYTES


def code_bytes(size: int, bits: int) -> int:
    """Of a vector's codes, which is where its minimums and scales begin; even."""
    if bits not in (4, 8):
        raise ValueError(f"values are packed into 4 or 8 bits, not {bits}")
    if size < 1:
        raise ValueError(f"a packed vector has at least one value, not {size}")
    whole, rest = divmod(size, GROUP)
    filled = whole * group_bytes(GROUP, bits) + group_bytes(rest, bits)
    return filled + filled % 2


def group_bytes(values: int, bits: int) -> int:
    """Of the codes of one group with so many values."""
    return values if bits == 8 else (values + 1) // 2


def num_groups(size: int) -> int:
    return -(-size // GROUP)
