"""Index tensors to autotune with: random masks of the density that training will mostly run at.

Kernel times depend on how many blocks are active and how evenly, so a table of zeros would pick the wrong tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_index


def realistic_index(grid: BlockGrid, density: float, device: torch.device | str) -> Tensor:
    """An index of a random mask, int32 ``[grid.index_length]``."""
    generator = torch.Generator("cpu").manual_seed(0)
    mask = torch.rand(grid.shape, generator=generator, device="cpu") < density
    index = new_index(grid)
    write_index(index, grid, mask)
    return index.to(device)
