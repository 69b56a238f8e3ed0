"""Frame of weight formats: all that placement, stores and checkpoints need to know of each.

A format says of which tensors of bytes a quantized matrix consists, and nothing else: these lie one
after the other, are copied and cut as bytes, and only kernels/dequantize.py reads values from them.
Knows no tensors' values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

Shape = tuple[int, ...]


class Format(ABC):
    """Form in which matrices are quantized; equal ones compare equal.

    name: as messages name it.
    """

    name: str

    @abstractmethod
    def tensors(self, shape: Shape) -> dict[str, Shape]:
        """{end of a tensor's name in a checkpoint: shape, of bytes} of what a weight consists of.

        shape: [..., rows, columns] of the values; the tensors have the same outer dimensions.
        Raises ValueError for a shape that the format can't hold.
        """

    def stored_shape(self, shape: Shape) -> Shape:
        """Shape of a stored weight: its only tensor's, or all tensors' bytes of a matrix in a row.

        shape: [..., rows, columns] of the values.
        """
        tensors, outer = list(self.tensors(shape).values()), shape[:-2]
        if len(tensors) == 1:
            return tensors[0]
        return (*outer, sum(prod(tensor[len(outer) :]) for tensor in tensors))
