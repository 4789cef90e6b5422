"""Block grids, and the packed index tensor that tells kernels which blocks of a weight are active.

A weight of shape ``[rows, cols]`` (as stored) is covered by a grid of ``block x block`` blocks. The grid is *ragged*:
its last block row and column are partial where ``block`` does not divide the shape.

The index is **one** contiguous ``int32`` tensor of fixed length, so that a compiled graph can take it as an input
once and topology changes can be written into it in place. Its layout, which ``kernels/`` and ``lowering/`` rely on::

    [0]  number of active blocks, n
    [1]  1 if the gradient of the weight is wanted on all blocks ("dense gradient"), else 0
    [2]  number of topology changes so far (diagnostic)
    [3..7] reserved, 0
    row_ptr[R + 1]   prefix sums of active blocks per block row       } CSR order: block row after block row,
    col_idx[R * C]   block column of each active block; first n used  } columns ascending
    col_ptr[C + 1]   prefix sums of active blocks per block column    } CSC order: block column after block column,
    row_idx[R * C]   block row of each active block; first n used     } rows ascending
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HEADER = 8
NNZ, DENSE_GRAD, CHANGES = 0, 1, 2


@dataclass(frozen=True)
class BlockGrid:
    """The grid of ``block x block`` blocks over a weight of ``rows x cols`` elements (stored orientation)."""

    rows: int
    cols: int
    block: int

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
    def index_length(self) -> int:
        """Number of int32 elements in the packed index."""
        return self.row_idx + self.blocks

    @property
    def edge(self) -> tuple[int, int]:
        """Height of the last block row and width of the last block column; less than ``block`` where ragged."""
        return self.rows - (self.block_rows - 1) * self.block, self.cols - (self.block_cols - 1) * self.block

    def count_elements(self, mask: Tensor) -> int:
        """Number of elements of the weight in the blocks of ``mask``, bool ``[R, C]``."""
        block, (height, width) = self.block, self.edge
        count = int(mask.sum()) * block * block
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


def new_index(grid: BlockGrid, device: torch.device | str = "cpu") -> Tensor:
    """An index with no active block, int32 ``[grid.index_length]``."""
    return torch.zeros(grid.index_length, dtype=torch.int32, device=device)


@torch.no_grad()
def write_index(index: Tensor, grid: BlockGrid, mask: Tensor, *, dense_grad: bool = False) -> None:
    """Pack ``mask`` (bool ``[R, C]``, any device) into ``index`` in place, in one copy.

    One copy means one bump of autograd's version counter: a change between forward and backward is then an error.
    """
    rows, cols = mask.nonzero(as_tuple=True)
    rows_t = mask.t().nonzero(as_tuple=True)[1]
    n = rows.numel()
    new = torch.zeros(grid.index_length, dtype=torch.int32, device=mask.device)
    new[NNZ] = n
    new[DENSE_GRAD] = int(dense_grad)
    new[CHANGES] = int(index[CHANGES]) + 1
    new[grid.row_ptr + 1 : grid.row_ptr + 1 + grid.block_rows] = mask.sum(1).cumsum(0)
    new[grid.col_idx : grid.col_idx + n] = cols
    new[grid.col_ptr + 1 : grid.col_ptr + 1 + grid.block_cols] = mask.sum(0).cumsum(0)
    new[grid.row_idx : grid.row_idx + n] = rows_t
    index.copy_(new)


def read_mask(index: Tensor, grid: BlockGrid) -> Tensor:
    """Block mask, bool ``[R, C]``, of a packed index (inverse of :func:`write_index`)."""
    n = int(index[NNZ])
    ptr = index[grid.row_ptr : grid.row_ptr + grid.block_rows + 1].long()
    rows = torch.repeat_interleave(torch.arange(grid.block_rows, device=index.device), ptr.diff(), output_size=n)
    mask = torch.zeros(grid.shape, dtype=torch.bool, device=index.device)
    mask[rows, index[grid.col_idx : grid.col_idx + n].long()] = True
    return mask
