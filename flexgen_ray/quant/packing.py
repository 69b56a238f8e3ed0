"""Layout of quantized vectors: codes of 4 or 8 bits, and minimum and scale per group of 64.

Group-wise asymmetric quantization (FlexGen, Sheng et al. 2023, section 5). Each vector is packed on
its own: the codes of all groups, one group after the other, padded to an even number of bytes; then
(minimum, scale) of each group as two float16. The last group may be shorter. A group of n values
has n bytes of codes with 8 bits, and ceil(n / 2) bytes with 4 bits: byte i holds value i in its low
nibble and value i + ceil(n / 2) in its high nibble, so that vector units unpack without shuffling.

For example a vector of 100 values in 4 bits takes 32 bytes of codes for 64 values, 18 for the other
36, and 2 x 4 bytes of parameters: 58 bytes, in place of 200 in float16.

Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_ray.quant.frame import Format, Shape

GROUP = 64
PARAMETER_BYTES = 4  # of a group: its minimum and its scale
# Largest magnitude that can be packed: a scale that is rounded up to float16 adds less than 128 to
# the largest value of a group, and float16 ends at 65504.
LARGEST = 65376.0


def packed_bytes(size: int, bits: int) -> int:
    """Bytes of a packed vector of `size` values, always even; ValueError unless bits are 4 or 8."""
    return code_bytes(size, bits) + num_groups(size) * PARAMETER_BYTES


def code_bytes(size: int, bits: int) -> int:
    """Bytes of a vector's codes, always even; its minimums and scales begin there."""
    if bits not in (4, 8):
        raise ValueError(f"values are packed into 4 or 8 bits, not {bits}")
    if size < 1:
        raise ValueError(f"a packed vector has at least one value, not {size}")
    whole, rest = divmod(size, GROUP)
    filled = whole * group_bytes(GROUP, bits) + group_bytes(rest, bits)
    return filled + filled % 2


def group_bytes(values: int, bits: int) -> int:
    """Bytes of the codes of one group of `values` values."""
    return values if bits == 8 else (values + 1) // 2


def num_groups(size: int) -> int:
    """Groups of a vector of `size` values; the last may be shorter."""
    return -(-size // GROUP)


@dataclass(frozen=True)
class PackedRows(Format):
    """Format of weights whose rows are packed vectors of 4 or 8 bits a value."""

    bits: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.bits} bits"

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        """One tensor, with the name of the weight: [..., rows, bytes of a row]."""
        return {"": (*shape[:-1], packed_bytes(shape[-1], self.bits))}
