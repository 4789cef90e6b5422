"""Block grids: how a weight is cut into blocks, and where each part of its packed index lies.

A weight of shape ``[rows, cols]`` (as stored) is covered by a grid of ``block x block`` blocks. The grid is *ragged*:
its last block row and column are partial where ``block`` does not divide the shape.

A *stack* of matrices in one tensor, ``[matrices, rows, cols]``, as of experts, has the grid of all their rows, one
matrix after the other. ``block`` divides the rows of each, so that none of its blocks lies in two of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

HEADER = 8  # numbers before the first part of a packed index, see mst_compile.blocks.index
TILE_BLOCK = 32  # the finest block with a part for the GPU
UNION_WIDTH = 128  # elements that a union of neighbouring block rows or columns covers


@dataclass(frozen=True)
class Lines:
    """Where an index keeps the active blocks of ``count`` lines (block rows, block columns, or unions of them) that
    cross ``length`` blocks each: offsets of the three parts, ``order`` -1 where the index has none."""

    count: int
    length: int
    ptr: int
    idx: int
    order: int


@dataclass(frozen=True)
class BlockGrid:
    """The grid of ``block x block`` blocks over a weight of ``rows x cols`` elements (stored orientation).

    Attributes:
        matrices: in a stack, of ``rows // matrices`` rows each; a weight that is none is one matrix of two dimensions.
    """

    rows: int
    cols: int
    block: int
    matrices: int = 0

    @staticmethod
    def over(shape: Sequence[int], block: int) -> BlockGrid:
        """The grid over a weight of this shape: ``[rows, cols]``, or ``[matrices, rows, cols]``."""
        *stack, rows, cols = shape
        return BlockGrid(rows * math.prod(stack), cols, block, math.prod(stack) if stack else 0)

    @property
    def matrix(self) -> BlockGrid:
        """The grid of one matrix."""
        return BlockGrid(self.rows // self.matrices, self.cols, self.block) if self.matrices else self

    @property
    def count(self) -> int:
        """How many matrices there are: 1 where it is no stack."""
        return self.matrices or 1

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the weight."""
        rows, cols = self.matrix.rows, self.cols
        return (self.matrices, rows, cols) if self.matrices else (rows, cols)

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """What ``[R, C]`` says of the blocks of each matrix, ``[R / matrices, C]``, as views."""
        return blocks.split(self.matrix.block_rows) if self.matrices else (blocks,)

    @property
    def block_rows(self) -> int:
        return -(-self.rows // self.block)

    @property
    def block_cols(self) -> int:
        return -(-self.cols // self.block)

    @property
    def shape(self) -> tuple[int, int]:
        return self.block_rows, self.block_cols

    @property
    def blocks(self) -> int:
        return self.block_rows * self.block_cols

    @property
    def row_ptr(self) -> int:
        return HEADER

    @property
    def col_idx(self) -> int:
        return self.row_ptr + self.block_rows + 1

    @property
    def col_ptr(self) -> int:
        return self.col_idx + self.blocks

    @property
    def row_idx(self) -> int:
        return self.col_ptr + self.block_cols + 1

    @property
    def tiled(self) -> bool:
        """Whether the index has the GPU's part."""
        return self.block >= TILE_BLOCK

    @property
    def union(self) -> int:
        """Number of neighbouring block rows or columns in a union, 1 where there are none."""
        return max(1, UNION_WIDTH // self.block) if self.tiled else 1

    @property
    def active(self) -> int:
        return self.row_idx + self.blocks

    def lines(self, by_rows: bool, *, union: bool = False) -> Lines:
        """Block rows (``by_rows``) or block columns, or the unions of them."""
        return _lines(self, by_rows, union)

    @property
    def index_length(self) -> int:
        """Number of int32 elements in the packed index."""
        if not self.tiled:
            return self.active
        last = self.lines(False, union=self.union > 1)
        return last.order + last.count

    @property
    def edge(self) -> tuple[int, int]:
        """Height of the last block row and width of the last block column; less than ``block`` where ragged."""
        return self.rows - (self.block_rows - 1) * self.block, self.cols - (self.block_cols - 1) * self.block

    def count_elements(self, mask: Tensor) -> int:
        """Number of elements of the weight in the blocks of ``mask``, bool ``[R, C]``."""
        block, (height, width) = self.block, self.edge
        count = int(mask.count_nonzero()) * block * block
        if height < block:
            count -= int(mask[-1].sum()) * (block - height) * block
        if width < block:
            count -= int(mask[:, -1].sum()) * (block - width) * block
        return count + int(mask[-1, -1]) * (block - height) * (block - width)

    def mean_of_sums_(self, sums: Tensor) -> Tensor:
        """Turn the sum over each block, ``[R, C]``, into the mean, in place."""
        block, (height, width) = self.block, self.edge
        sums /= block * block
        sums[-1] *= block / height
        sums[:, -1] *= block / width
        return sums

    def expand(self, mask: Tensor) -> Tensor:
        """Elementwise mask, bool ``[rows, cols]``, of a block mask, bool ``[R, C]``."""
        wide = mask.repeat_interleave(self.block, 0)[: self.rows]
        return wide.repeat_interleave(self.block, 1)[:, : self.cols]


def _length(lines: Lines) -> int:
    return lines.count + 1 + lines.count * lines.length + lines.count


@functools.lru_cache(maxsize=4096)
def _lines(grid: BlockGrid, by_rows: bool, union: bool) -> Lines:
    count, length = grid.shape if by_rows else grid.shape[::-1]
    orders = grid.active + grid.blocks
    if not union:
        ptr, idx = (grid.row_ptr, grid.col_idx) if by_rows else (grid.col_ptr, grid.row_idx)
        order = -1 if not grid.tiled else orders if by_rows else orders + grid.block_rows
        return Lines(count, length, ptr, idx, order)
    start = orders + grid.block_rows + grid.block_cols
    if not by_rows:
        start += _length(grid.lines(True, union=True))
    count = -(-count // grid.union)
    return Lines(count, length, start, start + count + 1, start + count + 1 + count * length)
