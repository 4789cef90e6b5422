"""The packed index tensor that tells kernels which blocks of a weight are active.

It is **one** contiguous ``int32`` tensor of fixed length, so that a compiled graph can take it as an input
once and topology changes can be written into it in place. Its layout, which ``kernels/`` and ``lowering/`` rely on::

    [0]  number of active blocks, n
    [1]  1 if the gradient of the weight is wanted on all blocks ("dense gradient"), else 0
    [2]  number of topology changes so far (diagnostic)
    [3..7] reserved, 0
    row_ptr[R + 1]   prefix sums of active blocks per block row       } CSR order: block row after block row,
    col_idx[R * C]   block column of each active block; first n used  } columns ascending
    col_ptr[C + 1]   prefix sums of active blocks per block column    } CSC order: block column after block column,
    row_idx[R * C]   block row of each active block; first n used     } rows ascending

That of a stack of matrices is ``[matrices, length]``: an index of this kind for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import BlockGrid, Lines

NNZ, DENSE_GRAD, CHANGES = 0, 1, 2


def new_index(grid: BlockGrid, device: torch.device | str = "cpu") -> Tensor:
    """An index with no active block, int32 ``[grid.index_length]``; of a stack ``[matrices, length]``."""
    stack = (grid.matrices,) if grid.matrices else ()
    return torch.zeros(*stack, grid.matrix.index_length, dtype=torch.int32, device=device)


@torch.no_grad()
def write_index(
    index: Tensor, grid: BlockGrid, mask: Tensor, *, dense_grad: bool = False, changes: int | None = None
) -> None:
    """Pack ``mask`` (bool ``[R, C]``; on the CPU is cheapest) into ``index`` (any device) in place.

    Autograd's version counter goes up by one: a change between forward and backward is then an error.

    Args:
        changes: how many there were with this one; None: one more than the index says, which a GPU is waited for.
    """
    if not grid.tiled and not grid.matrices and index.device == mask.device:
        # No copy: that of fine blocks would be larger than the weight.
        words = index.data  # has a version of its own
        words[CHANGES] = int(words[CHANGES]) + 1 if changes is None else changes
        words[DENSE_GRAD] = int(dense_grad)
        _write_compressed(words, grid, mask, int(words[NNZ]))
        torch.autograd.graph.increment_version(index)
        return
    number = int(index.view(-1)[CHANGES]) + 1 if changes is None else changes
    upload_(index, _packed(grid, mask, dense_grad, number).view(index.shape))


class Content(NamedTuple):
    """What is to be written to an index: the arguments of :func:`write_index`."""

    to: Tensor
    grid: BlockGrid
    mask: Tensor
    dense_grad: bool
    changes: int


@torch.no_grad()
def write_indexes(contents: Sequence[Content]) -> None:
    """:func:`write_index` of each, where the host's masks go to a GPU all at once: one transfer, out of one piece of
    pinned memory, and one launch that hands out what has arrived to the indexes, whose memory compiled graphs know."""
    together: dict[torch.device, list[Content]] = {}
    for content in contents:
        index, grid, mask, dense_grad, changes = content
        if _goes_far(index, mask):
            together.setdefault(index.device, []).append(content)
        else:
            write_index(index, grid, mask, dense_grad=dense_grad, changes=changes)
    for device, own in together.items():
        packed = torch.cat([_packed(c.grid, c.mask, c.dense_grad, c.changes) for c in own])
        there = torch.empty_like(packed, device=device)
        upload_(there, packed)
        indexes = [content.to.view(-1) for content in own]
        torch._foreach_copy_(indexes, there.split([index.numel() for index in indexes]))


def _goes_far(index: Tensor, mask: Tensor) -> bool:
    """Whether each index of its own would be a transfer."""
    return index.is_cuda and mask.device.type == "cpu"


@torch.no_grad()
def write_dense_grad(indexes: Sequence[Tensor], wanted: bool) -> None:
    """Say in indexes whether the gradient is wanted on all blocks: one launch for those of a GPU."""
    words = [one[DENSE_GRAD] for index in indexes for one in (index if index.dim() == 2 else (index,))]
    if not words:
        return
    # They are 0 or 1, and nothing sets a list to a number; an assignment would copy one from the host, each time.
    if wanted:
        torch._foreach_clamp_min_(words, 1)
    else:
        torch._foreach_zero_(words)


def _packed(grid: BlockGrid, mask: Tensor, dense_grad: bool, changes: int) -> Tensor:
    """The index, where its mask is; of a stack those of all its matrices, one after the other."""
    if not grid.matrices:
        return _packed_matrix(grid, mask, dense_grad, changes)
    return torch.cat([_packed_matrix(grid.matrix, one, dense_grad, changes) for one in grid.split(mask)])


def _packed_matrix(grid: BlockGrid, mask: Tensor, dense_grad: bool, changes: int) -> Tensor:
    new = torch.zeros(grid.index_length, dtype=torch.int32, device=mask.device)
    new[DENSE_GRAD] = int(dense_grad)
    new[CHANGES] = changes
    _write_compressed(new, grid, mask, 0)
    if grid.tiled:
        new[grid.active : grid.active + grid.blocks] = mask.flatten()
    if grid.union > 1:
        _write_lines(new, grid.lines(True, union=True), _united(mask, grid.union))
        _write_lines(new, grid.lines(False, union=True), _united(mask.t(), grid.union))
    return new


def upload_(to: Tensor, host: Tensor) -> None:
    """Copy a tensor of the host's to one of its shape and dtype on any device.

    To a GPU out of pinned memory, which PyTorch keeps until the copy is made: for one out of other memory the host
    waits until the device has come to it.
    """
    if to.is_cuda and host.device.type == "cpu":
        to.copy_(host.pin_memory(), non_blocking=True)
    else:
        to.copy_(host)


def _write_compressed(index: Tensor, grid: BlockGrid, mask: Tensor, before: int) -> None:
    """Write CSR and CSC order, and 0 over what is left of an index of ``before`` blocks."""
    for by_rows in (True, False):
        lines = grid.lines(by_rows)
        n = _write_lines(index, lines, mask if by_rows else mask.t())
        index[lines.idx + n : lines.idx + max(n, before)] = 0
    index[NNZ] = n


def _write_lines(index: Tensor, lines: Lines, mask: Tensor) -> int:
    """Write one set of lines; ``mask`` is bool ``[lines.count, lines.length]``. Returns how many blocks it has."""
    mask = mask.contiguous()
    crossed = mask.flatten().nonzero()[:, 0].int()
    crossed %= lines.length
    lengths = mask.sum(1, dtype=torch.int32)
    index[lines.ptr + 1 : lines.ptr + 1 + lines.count] = lengths.cumsum(0)
    index[lines.idx : lines.idx + crossed.numel()] = crossed
    if lines.order >= 0:
        order = torch.argsort(lengths, descending=True, stable=True)
        index[lines.order : lines.order + lines.count] = order
    return crossed.numel()


def _united(mask: Tensor, union: int) -> Tensor:
    """Rows of ``mask`` joined by or, ``union`` neighbours at a time."""
    padded = torch.nn.functional.pad(mask, (0, 0, 0, -mask.shape[0] % union))
    return padded.view(-1, union, mask.shape[1]).any(1)


def read_mask(index: Tensor, grid: BlockGrid) -> Tensor:
    """Block mask, bool ``[R, C]``, of a packed index (inverse of :func:`write_index`)."""
    if grid.matrices:
        return torch.cat([read_mask(one, grid.matrix) for one in index])
    if grid.tiled:
        return index[grid.active : grid.active + grid.blocks].view(grid.shape).bool()
    n = int(index[NNZ])
    ptr = index[grid.row_ptr : grid.row_ptr + grid.block_rows + 1].long()
    rows = torch.repeat_interleave(torch.arange(grid.block_rows, device=index.device), ptr.diff(), output_size=n)
    mask = torch.zeros(grid.shape, dtype=torch.bool, device=index.device)
    mask[rows, index[grid.col_idx : grid.col_idx + n].long()] = True
    return mask
