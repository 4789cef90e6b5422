"""What is in each block of a matrix, in the order in which the GPU's kernel adds it up, written in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid

KINDS = ("squares", "magnitudes", "nonzero")


def measured(tensor: Tensor, grid: BlockGrid, kind: str) -> Tensor:
    """float32 ``[R, C]``: sums down each column, row after row, then of columns in pairs, and pairs of these."""
    pad = (0, grid.block_cols * grid.block - grid.cols, 0, grid.block_rows * grid.block - grid.rows)
    values = torch.nn.functional.pad(tensor, pad).view(grid.block_rows, grid.block, grid.block_cols, grid.block)
    if kind == "nonzero":
        return (values != 0).any(3).any(1).float()
    values = values.float()
    values = values * values if kind == "squares" else values.abs()
    found = torch.zeros(grid.block_rows, grid.block_cols, grid.block, device=tensor.device)
    for row in range(grid.block):
        found = found + values[:, row]
    while found.shape[-1] > 1:
        found = found[..., 0::2] + found[..., 1::2]
    return found[..., 0]
