"""A weight as its active blocks alone, packed in the order in which a product reads them, for inference.

Of a weight ``[outputs, reduction]`` under blocks of ``B``, with ``n`` of them active:

- ``values``, ``[n * B * B]`` of the weight's dtype: for each block row, strip of ``min(B, 8)`` rows in it and active
  block, columns ascending: pairs of columns, in each the strip's rows, of each two neighbours. Blocks of 1 have no
  pairs. Partial blocks at the edges are filled up with zeros.
- ``index``, int32 ``[R + 1 + n]``: prefix sums of active blocks per block row, then the block column of each.

Every dtype is laid out alike, so that a cast is one of ``values``. ``kernels/cpu/spmm_packed.cpp`` relies on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import BlockGrid

LARGEST_BLOCK = 128
_STRIP = 8


def pack(weight: Tensor, grid: BlockGrid, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` and ``index`` of the active blocks of ``weight`` ``[outputs, reduction]``, on its device.

    Args:
        mask: bool ``[R, C]``, the active blocks. What stands outside them is left out.
    """
    padded = torch.nn.functional.pad(weight, (0, -grid.cols % grid.block, 0, -grid.rows % grid.block))
    values = padded.view(_stored(grid)).permute(0, 1, 3, 4, 2, 5)[_strips(mask.to(weight.device), grid)]
    columns = mask.nonzero()[:, 1]
    pointers = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return values.flatten(), torch.cat([pointers, columns]).int().to(weight.device)


def unpack(values: Tensor, index: Tensor, grid: BlockGrid) -> Tensor:
    """The dense weight ``[outputs, reduction]``, 0 outside the active blocks: inverse of :func:`pack`."""
    rows, strips, height, cols, pairs, pair = _stored(grid)
    dense = values.new_zeros(rows, strips, cols, pairs, height, pair)
    dense[_strips(packed_mask(index, grid), grid)] = values.view(-1, pairs, height, pair)
    padded = dense.permute(0, 1, 4, 2, 3, 5).reshape(rows * grid.block, cols * grid.block)
    return padded[: grid.rows, : grid.cols]


def packed_mask(index: Tensor, grid: BlockGrid) -> Tensor:
    """Block mask, bool ``[R, C]``, of a packed weight's index."""
    pointers, columns = index[: grid.block_rows + 1].long(), index[grid.block_rows + 1 :].long()
    lines = torch.arange(grid.block_rows, device=index.device)
    mask = torch.zeros(grid.shape, dtype=torch.bool, device=index.device)
    mask[torch.repeat_interleave(lines, pointers.diff(), output_size=columns.numel()), columns] = True
    return mask


def why_no_packed(values: Tensor, index: Tensor, grid: BlockGrid) -> str | None:
    """Why these two are no packed weight of this grid, or None if they are. Reads the whole index."""
    rows, cols = grid.shape
    if index.dtype != torch.int32 or index.dim() != 1 or index.numel() < rows + 1:
        return f"an index of {rows} block rows is int32 [{rows + 1} + blocks], not {index.dtype} {tuple(index.shape)}"
    pointers, columns = index[: rows + 1].long().cpu(), index[rows + 1 :].long().cpu()
    if int(pointers[0]) or int(pointers[-1]) != columns.numel() or bool((pointers.diff() < 0).any()):
        return f"its block rows do not hold the {columns.numel()} blocks of its index"
    if columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= cols):
        return f"blocks lie in columns {int(columns.min())} to {int(columns.max())} of {cols}"
    starts = torch.zeros(columns.numel() + 1, dtype=torch.bool, device="cpu")
    starts[pointers] = True
    if bool((columns.diff() <= 0)[~starts[1:-1]].any()):
        return "the columns of a block row do not ascend"
    if values.shape != (columns.numel() * grid.block**2,):
        return f"{columns.numel()} blocks of {grid.block} are not values of shape {tuple(values.shape)}"
    return None


def _stored(grid: BlockGrid) -> tuple[int, int, int, int, int, int]:
    """A padded weight's ``[block rows, strips, rows of a strip, block columns, pairs, numbers of a pair]``."""
    height, pair = min(grid.block, _STRIP), min(grid.block, 2)
    return grid.block_rows, grid.block // height, height, grid.block_cols, grid.block // pair, pair


def _strips(mask: Tensor, grid: BlockGrid) -> Tensor:
    """Which blocks each strip has, bool ``[R, strips, C]``."""
    return mask[:, None, :].expand(-1, grid.block // min(grid.block, _STRIP), -1)
