"""Indexes of parts of a weight, where programs multiply these alone: rows of a packed projection, one of two halves.

A part has a packed index of its own, beside the weight's, so that products with it are those that there are, on a view
of the weight. It is made when a graph first asks for it, and written whenever the weight's is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import Content
from mst_compile.blocks.layout import Part, reaching


@dataclass(eq=False)
class Range:
    """A part of a weight that products take.

    Attributes:
        part: which; its blocks are those of a grid of its own, as :func:`mst_compile.blocks.layout.reaching` says.
        index: packed, of that grid.
        active: how many of its elements are in active blocks.
        counted: the number of the weight's topology changes when they were counted.
    """

    part: Part
    index: Tensor
    active: int = 0
    counted: int = -1

    def content(self, mask: Tensor, block: int, dense_grad: bool, changes: int) -> Content:
        """What the index has to hold under the weight's mask, bool ``[R, C]``."""
        return Content(self.index, self.part.grid(block), reaching(mask, self.part, block), dense_grad, changes)

    def count(self, mask: Tensor, block: int, changes: int) -> int:
        """How many elements are in active blocks: counted once for each mask."""
        if self.counted != changes:
            self.active = self.part.grid(block).count_elements(reaching(mask, self.part, block))
            self.counted = changes
        return self.active


def is_cut(part: Part, grid: BlockGrid) -> bool:
    """Whether a part begins or ends within blocks, so that gradients of products with it reach into blocks of its own
    grid that the weight's mask does not hold."""
    ends = ((part.row, part.rows, grid.rows), (part.col, part.cols, grid.cols))
    return any(start % grid.block or ((start + n) % grid.block and start + n < whole) for start, n, whole in ends)
