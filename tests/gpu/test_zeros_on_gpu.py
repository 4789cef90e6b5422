"""Zeroing what lies outside the active blocks, on the card, bit for bit."""

from __future__ import annotations

import pytest
import torch
from mask_cases import expand, index_of
from oracles import assert_same_bits
from torch import Tensor

from mst_compile.blocks.bulk import zero_all_inactive_
from mst_compile.blocks.grid import BlockGrid

SIZES = ((2304, 768), (50257, 64), (199, 129), (96, 40))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def mask_of(grid: BlockGrid) -> Tensor:
    return torch.rand(grid.shape, generator=torch.Generator().manual_seed(1)) < 0.3


@pytest.mark.rank(1)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_all_in_one_go(block: int, device: torch.device) -> None:
    items, expected = [], []
    for (rows, cols), dtype in ((size, dtype) for size in SIZES for dtype in DTYPES):
        grid = BlockGrid(rows, cols, block)
        mask = mask_of(grid)
        tensor = torch.randn(rows, cols).to(device, dtype)
        tensor[0, 0] = torch.nan
        index = index_of(mask, rows, cols, block).to(device)
        items.append((tensor, grid, mask, index))
        keep = expand(mask, rows, cols, block).to(device)
        expected.append(torch.where(keep, tensor, torch.zeros((), dtype=dtype, device=device)))
    versions = [tensor._version for tensor, *_ in items]
    for _ in range(2):  # the second time from the table that is there
        zero_all_inactive_(items)
    for (tensor, *_), right in zip(items, expected, strict=True):
        assert_same_bits(tensor.cpu(), right.cpu())
    assert all(tensor._version > version for (tensor, *_), version in zip(items, versions, strict=True))
