"""Weight formats: which weights of a model are quantized, and in which form.

Matrices of decoder layers, the embedding's table and the head may be quantized (frame.py says how
forms differ). Biases, norms and routers are small and stay in the model's dtype, but for
routers' corrections. Knows names and shapes; no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from flexgen_ray.config import DTYPE_BYTES
from flexgen_ray.quant.frame import Format, Shape
from flexgen_ray.quant.mxfp4 import Mxfp4
from flexgen_ray.quant.packing import PackedRows
from flexgen_ray.schedule.ops import OpKind

# {quant_method of a checkpoint's config.json, and its name in a ModelConfig: format of its experts}
FORMATS: dict[str, Format] = {"mxfp4": Mxfp4()}
TABLES = ("embed_tokens.weight", "lm_head.weight")
_PLAIN = (
    "embed_positions.weight", "project_in.weight", "project_out.weight", "router.weight",
    "shared_gate.weight",
)  # fmt: skip
_WIDE = ("router.e_score_correction_bias",)  # in float32: rounded, other experts are chosen
_PARTS_OF_OPS = {OpKind.PROJECT: "project", OpKind.EXPERTS: "experts"}
PARTS = ("project", "finish", "experts", "head")  # ops whose weights are dequantized together


@dataclass(frozen=True)
class WeightFormat:
    """Formats in which a model's weights are stored.

    bits: of decoder matrices; table_bits: of embedding and head; None: not quantized, as `dtype`.
    experts: format of experts' matrices in the checkpoint, by its name in FORMATS; None if it holds
    values, for which bits count.
    Raises ValueError for bits beside experts, which would be quantized again.
    """

    dtype: str
    bits: int | None = None
    table_bits: int | None = None
    experts: str | None = None

    def __post_init__(self) -> None:
        if self.bits and self.experts:
            raise ValueError(
                f"the checkpoint has its experts in {FORMATS[self.experts].name}, and weight_bits "
                f"is {self.bits}: they aren't quantized again; leave weight_bits out "
                "(embedding_bits and cache_bits may be set)"
            )

    @property
    def is_quantized(self) -> bool:
        """True if any weight is quantized."""
        return bool(self.bits or self.table_bits or self.experts)

    @property
    def described(self) -> str:
        """The dtype, and the format in which a checkpoint has its experts."""
        return (
            f"{self.dtype}, experts in {FORMATS[self.experts].name}" if self.experts else self.dtype
        )

    def format_of(self, name: str, shape: Shape) -> Format | None:
        """Format of a weight; None if it is not quantized."""
        if len(shape) < 2 or name in _PLAIN or ".bias" in name:
            return None
        if self.experts and len(shape) == 3:
            return FORMATS[self.experts]
        bits = self.table_bits if name in TABLES else self.bits
        return PackedRows(bits) if bits else None

    def dtype_of(self, name: str) -> str:
        """Dtype of a weight that is not quantized."""
        return "float32" if name in _WIDE else self.dtype

    def stored_shape(self, name: str, shape: Shape) -> Shape:
        """Shape of a stored weight; it counts bytes if the weight is quantized."""
        form = self.format_of(name, shape)
        return form.stored_shape(shape) if form else shape

    def stored_bytes(self, name: str, shape: Shape) -> int:
        """Bytes of a stored weight."""
        each = 1 if self.format_of(name, shape) else DTYPE_BYTES[self.dtype_of(name)]
        return prod(self.stored_shape(name, shape)) * each

    def quantized_weights(self, shapes: dict[str, Shape], part: str) -> dict[str, Shape]:
        """{name: shape} of the quantized weights that one of PARTS uses.

        shapes: those of all weights of a layer.
        """
        return {
            name: shape
            for name, shape in shapes.items()
            if part_of_weight(name) == part and self.format_of(name, shape)
        }


def part_of_op(kind: OpKind, is_head: bool) -> str:
    """The one of PARTS whose weights an op uses."""
    if is_head:
        return "head"
    return _PARTS_OF_OPS.get(kind, "finish")


def part_of_weight(name: str) -> str:
    """The one of PARTS that uses a weight."""
    if name in TABLES:
        return "head"
    if name == "qkv_proj.weight":
        return "project"
    return "experts" if "_experts." in name else "finish"
