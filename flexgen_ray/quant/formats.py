"""How weights are kept: as the dtype has them, or packed; and what unpacking them takes.

Matrices of decoder layers and the tables of both ends may be packed (quant/packing.py); what is
added, or multiplied element by element, is small and stays as it is. Knows names and shapes; no
tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.quant.packing import packed_bytes
from flexgen_ray.schedule.ops import OpKind

Shape = tuple[int, ...]

TABLES = ("embed_tokens.weight", "lm_head.weight")
_PLAIN = ("embed_positions.weight", "project_in.weight", "project_out.weight")
_PROJECTED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
PARTS = ("project", "finish", "head")  # whose weights are unpacked together


@dataclass(frozen=True)
class WeightFormat:
    """bits: of packed matrices; table_bits: of embedding and head; None: as the dtype has them."""

    dtype: str
    bits: int | None = None
    table_bits: int | None = None

    @property
    def is_quantized(self) -> bool:
        """True if any weight is packed."""
        return bool(self.bits or self.table_bits)

    def bits_of(self, name: str, shape: Shape) -> int | None:
        """Of a packed weight; None for one that isn't packed."""
        if len(shape) < 2 or name in _PLAIN:
            return None
        return self.table_bits if name in TABLES else self.bits

    def stored_shape(self, name: str, shape: Shape) -> Shape:
        """In bytes where it is packed, else in elements."""
        bits = self.bits_of(name, shape)
        return (*shape[:-1], packed_bytes(shape[-1], bits)) if bits else shape

    def stored_bytes(self, name: str, shape: Shape) -> int:
        each = 1 if self.bits_of(name, shape) else DTYPE_BYTES[self.dtype]
        return prod(self.stored_shape(name, shape)) * each

    def unpacked(self, shapes: dict[str, Shape], part: str) -> dict[str, Shape]:
        """The packed ones of a layer's weights that a part takes."""
        return {
            name: shape
            for name, shape in shapes.items()
            if self.bits_of(name, shape) and part_of_weight(name) == part
        }


def part_of_op(kind: OpKind, is_head: bool) -> str:
    """The one of PARTS whose weights an op takes: PROJECT, or FINISH of a decoder layer or head."""
    if is_head:
        return "head"
    return "project" if kind is OpKind.PROJECT else "finish"


def part_of_weight(name: str) -> str:
    """The one of PARTS that a weight belongs to."""
    if name in TABLES:
        return "head"
    return "project" if name in _PROJECTED else "finish"
