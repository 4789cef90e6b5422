"""Bulk operations on the blocks of a dense tensor: own kernels where they run, plain PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .blockindex import BlockGrid, read_mask
from .kernels import cpu


def _native(tensor: Tensor, grid: BlockGrid) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and tensor.stride(-1) == 1
        and cpu.supports(grid.block, tensor.dtype, tensor.dtype)
        and cpu.available()
    )


@torch.no_grad()
def zero_inactive_(tensor: Tensor, grid: BlockGrid, mask: Tensor, index: Tensor | None) -> None:
    """Set every element of ``tensor`` (``[rows, cols]``, any dtype) outside the active blocks to 0, in place.

    Args:
        mask: bool ``[R, C]``, the active blocks.
        index: the packed index of the same blocks on the tensor's device, if there is one; it serves the kernels.
    """
    if index is not None and _native(tensor, grid):
        cpu.zero_inactive_(tensor, index, grid.block)
        # Autograd cannot see what a kernel writes: a change between forward and backward must not pass unnoticed.
        torch.autograd.graph.increment_version(tensor)
        return
    # On a GPU the index already holds the mask: copying the host's would wait for the device.
    here = index is not None and grid.tiled and index.device == tensor.device
    inactive = ~(read_mask(index, grid) if here else mask.to(tensor.device))  # type: ignore[arg-type]
    for rows, block_rows, height in _whole_and_edge(grid.rows, grid.block):
        for cols, block_cols, width in _whole_and_edge(grid.cols, grid.block):
            blocks = tensor[rows, cols].unflatten(1, (-1, width)).unflatten(0, (-1, height))
            blocks.masked_fill_(inactive[block_rows, block_cols][:, None, :, None], 0)


def _whole_and_edge(size: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """Elements, blocks and edge of the whole blocks along a dimension, and of the partial one at its end."""
    whole = size // block
    if whole:
        yield slice(0, whole * block), slice(0, whole), block
    if size % block:
        yield slice(whole * block, size), slice(whole, whole + 1), size % block


@torch.no_grad()
def zero_blocks_(tensor: Tensor, grid: BlockGrid, blocks: Tensor) -> None:
    """Set the given ``blocks`` (bool ``[R, C]``) of ``tensor`` to 0, in place; cheap where they are few."""
    rows, cols = (i.to(tensor.device) for i in blocks.nonzero(as_tuple=True))
    if grid.edge == (grid.block, grid.block) and tensor.is_contiguous():
        tensor.view(grid.block_rows, grid.block, grid.block_cols, grid.block)[rows, :, cols] = 0
        return
    within = torch.arange(grid.block, device=tensor.device)
    # Positions past a ragged edge are clamped: they write the edge's own elements, which belong to the same block.
    r = (rows[:, None] * grid.block + within).clamp_(max=grid.rows - 1)
    c = (cols[:, None] * grid.block + within).clamp_(max=grid.cols - 1)
    tensor[r[:, :, None], c[:, None, :]] = 0


@torch.no_grad()
def block_mean_square(tensor: Tensor, grid: BlockGrid) -> Tensor:
    """Mean square of each block of ``tensor`` (``[rows, cols]``): float32 ``[R, C]`` on the CPU."""
    if grid.block == 1:
        return tensor.detach().float().square().cpu()
    if _native(tensor, grid):
        return grid.mean_of_sums_(cpu.block_sumsq(tensor.detach(), grid.block))
    pad = (0, grid.block_cols * grid.block - grid.cols, 0, grid.block_rows * grid.block - grid.rows)
    square = torch.nn.functional.pad(tensor.detach().float(), pad).square_()
    sums = square.view(grid.block_rows, grid.block, grid.block_cols, grid.block).sum((1, 3))
    return grid.mean_of_sums_(sums).cpu()


def mask_like(index: Tensor, grid: BlockGrid) -> Tensor:
    """Elementwise mask, bool ``[rows, cols]``, of a packed index."""
    return grid.expand(read_mask(index, grid))
