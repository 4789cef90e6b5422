"""Which weights have an index, and the count of what changes in any."""

from __future__ import annotations

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index
from mst_compile.lowering import device as devices


class _Epoch:
    """Counts what changes between calls of a compiled graph beside the versions of weights: masks, and who holds
    them."""

    value = 0


class _Activity:
    """Counts gradients of sparse weights and optimizer steps in this process: while it stands still nobody trains, and
    so nobody follows training with averages of weights."""

    value = 0


epoch = _Epoch()
activity = _Activity()


def has_index(grid: BlockGrid, device: torch.device) -> bool:
    """Whether a device may have kernels for such blocks. An index of fine ones is larger than the weight itself; and of
    some weights a rank holds nothing."""
    if grid.matrices and not devices.of(device.type).multiplies_stacks:
        return False
    return grid.rows * grid.cols > 0 and grid.block >= min(devices.of(device.type).finest_block, devices.FINEST_BLOCK)


def index_for(grid: BlockGrid, device: torch.device) -> Tensor | None:
    """An index with no active block, where there may be kernels for it."""
    return new_index(grid, device) if has_index(grid, device) else None
