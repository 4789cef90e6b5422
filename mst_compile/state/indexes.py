"""The indexes of weights: where there are any, and what is written to those of many in one go. On a GPU a launch and a
transfer cost the host the same for all of them as for one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_dense_grad, write_indexes
from mst_compile.lowering import device as devices

if TYPE_CHECKING:
    from .weight import SparseWeight


class _Epoch:
    """Counts what changes between calls of a compiled graph beside the versions of weights: masks, and who holds
    them."""

    value = 0


epoch = _Epoch()


def has_index(grid: BlockGrid, device: torch.device) -> bool:
    """Whether a device may have kernels for such blocks. An index of fine ones is larger than the weight itself; and of
    some weights a rank holds nothing."""
    if grid.matrices and not devices.of(device.type).multiplies_stacks:
        return False
    return grid.rows * grid.cols > 0 and grid.block >= min(devices.of(device.type).finest_block, devices.FINEST_BLOCK)


def index_for(grid: BlockGrid, device: torch.device) -> Tensor | None:
    """An index with no active block, where there may be kernels for it."""
    return new_index(grid, device) if has_index(grid, device) else None


def write_taken(weights: Iterable[SparseWeight]) -> None:
    """Write the indexes of those weights that have taken over a mask since theirs was written."""
    late = [weight for weight in weights if weight.unwritten]
    if late:
        epoch.value += 1
    write_indexes([content for weight in late if (content := weight.content) is not None])
    for weight in late:
        weight.unwritten = False


def want_dense_gradients(weights: Iterable[SparseWeight], wanted: bool) -> None:
    """Ask kernels for gradients on all blocks, which growth reads, or on the active ones alone."""
    changing = [weight for weight in weights if weight.dense_grad != wanted]
    write_dense_grad([weight.index for weight in changing if weight.index is not None], wanted)
    for weight in changing:
        weight.dense_grad = wanted
