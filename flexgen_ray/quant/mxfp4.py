"""Layout of MXFP4: 32 values of four bits beside each other in a row share a power of two.

From the OCP Microscaling formats (Rouhani et al. 2023), in the layout of gpt-oss's checkpoints:
`_blocks` has 16 bytes a group, the even values in low nibbles and the odd ones in high nibbles;
`_scales` has a byte a group, the exponent of its power of two and 127. A value of four bits (e2m1)
is a sign and one of MAGNITUDES. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_ray.quant.frame import Format, Shape

GROUP = 32
GROUP_BYTES = 16
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Mxfp4(Format):
    """Format of matrices whose rows are groups of 32 values in 17 bytes."""

    name = "MXFP4"

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        """Blocks [..., rows, groups, 16] and scales [..., rows, groups].

        Raises ValueError unless columns are whole groups.
        """
        *outer, columns = shape
        if columns % GROUP:
            raise ValueError(
                f"MXFP4 has groups of {GROUP} values, which {columns} columns can't be cut into"
            )
        groups = columns // GROUP
        return {"_blocks": (*outer, groups, GROUP_BYTES), "_scales": (*outer, groups)}
