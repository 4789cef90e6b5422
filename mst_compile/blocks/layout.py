"""Which part of a matrix a rank holds, and which blocks reach into it: pure functions of layouts.

A stack of matrices in one tensor, as of experts, counts as one matrix of all their rows.

A DTensor cuts a matrix along each dimension of its mesh. Whatever cuts rows and columns into consecutive runs, as
``ColwiseParallel``, ``RowwiseParallel`` and ``fully_shard`` do, one over the other too, leaves every rank one rectangle
(:class:`Part`). Its edges may lie within blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard


@dataclass(frozen=True)
class Part:
    """The ``rows x cols`` elements of a matrix from (``row``, ``col``) on; none, if either is 0."""

    row: int
    col: int
    rows: int
    cols: int

    def of(self, whole: Tensor) -> Tensor:
        """This part of a matrix, as a view."""
        return whole[self.row : self.row + self.rows, self.col : self.col + self.cols]

    def grid(self, block: int) -> BlockGrid:
        """A grid that begins where the part does."""
        return BlockGrid(self.rows, self.cols, block)


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor of a weight's shape as a matrix: itself, or the matrices of a stack one below the other. A view where
    strides allow it, as those of a Parameter that is sparse do; else a copy."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def are_one_matrix(stack: Tensor) -> bool:
    """Whether the matrices of a stack, ``[matrices, rows, cols]``, lie as the rows of one matrix would: whether
    :func:`as_matrix` is a view."""
    rows = stack.shape[1]
    return len(stack) == 1 or rows == 1 or stack.stride(0) == rows * stack.stride(1)


def part_of(
    shape: Sequence[int], placements: Sequence[Placement], sizes: Sequence[int], coordinate: Sequence[int]
) -> Part | None:
    """The part of a matrix that a rank holds.

    Args:
        shape: of the matrix, or of a stack of them.
        placements: one for each dimension of the mesh; ranks along one that does not shard hold the same part.
        sizes: of the mesh.
        coordinate: of the rank in it.

    Returns:
        None where it is not one rectangle: rows or columns are interleaved, matrices of a stack are cut, or the
        matrix is none.
    """
    if len(shape) == 3:
        if any(getattr(placement, "dim", None) != 0 for placement in placements if not _is_whole(placement)):
            return None
        part = part_of((shape[0], shape[1] * shape[2]), placements, sizes, coordinate)
        return part and Part(part.row * shape[1], 0, part.rows * shape[1], shape[2])
    if len(shape) != 2:
        return None
    spans = []
    for dim, length in enumerate(shape):
        order = _order(dim, placements, sizes)
        if order is None:
            return None
        start = 0
        for cut in order:  # as torch.chunk cuts: runs of one length, the last ones shorter or empty
            run = -(-length // sizes[cut])
            begin = min(coordinate[cut] * run, length)
            start, length = start + begin, min(run, length - begin)
        spans.append((start, length))
    (row, rows), (col, cols) = spans
    return Part(row, col, rows, cols)


def _is_whole(placement: Placement) -> bool:
    return isinstance(placement, Replicate) or placement.is_partial()


def _order(dim: int, placements: Sequence[Placement], sizes: Sequence[int]) -> list[int] | None:
    """The dimensions of the mesh that cut dimension ``dim`` of a matrix, the one that cuts first in front; None if what
    they leave is not consecutive.

    Usually they cut from left to right. ``fully_shard`` cuts what tensor parallelism has left, though its dimension of
    the mesh comes first: it says so by the number of pieces that it found (``split_factor``).
    """
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if isinstance(placement, _StridedShard):
            if placement.dim != dim:
                continue
            place, pieces = 0, 1
            while pieces < placement.split_factor and place < len(order):
                pieces *= sizes[order[place]]
                place += 1
            if pieces != placement.split_factor:
                return None
            order.insert(place, mesh_dim)
        elif type(placement) is Shard:
            if placement.dim == dim:
                order.insert(0, mesh_dim)
        elif not _is_whole(placement):
            return None
    return order


def reaching(mask: Tensor, part: Part, block: int) -> Tensor:
    """The blocks of a part's own grid that an active block of the whole reaches into.

    Where the part begins on an edge of blocks they are its active blocks. Elsewhere each lies in up to four blocks of
    the whole, and more elements are in blocks that count than are active.

    Args:
        mask: bool ``[R, C]``, the active blocks of the whole matrix.

    Returns:
        bool, of the shape of ``part.grid(block)``.
    """
    (top, bottom), (left, right) = (
        _reached(part.row, part.rows, block),
        _reached(part.col, part.cols, block),
    )
    rows = mask[top] | mask[bottom]
    return rows[:, left] | rows[:, right]


def _reached(start: int, length: int, block: int) -> tuple[Tensor, Tensor]:
    """For each block of a run of elements, the first and the last block of the whole that it has elements of."""
    first = torch.arange(start, start + length, block, device="cpu")
    last = (first + block - 1).clamp_(max=max(start + length - 1, 0))
    return first // block, last // block
