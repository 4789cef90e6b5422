"""What goes from the host to a device: masks once, not at every step."""

from __future__ import annotations

import pytest
import torch

from mst_compile.blocks import bulk
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import CHANGES, new_index, write_index


def test_a_mask_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(bulk, "upload_", lambda to, host: copied.append(to.device))
    mask, meta = torch.eye(3, dtype=torch.bool), torch.device("meta")
    first = bulk._there(mask, meta)
    assert first.device == meta
    assert bulk._there(mask, meta) is first
    assert len(copied) == 1
    mask[0, 1] = True  # written in place
    bulk._there(mask, meta)
    assert len(copied) == 2
    bulk._there(mask.clone(), meta)  # another mask
    assert len(copied) == 3
    assert bulk._there(mask, torch.device("cpu")) is mask
    assert len(copied) == 3


@pytest.mark.parametrize("block", [4, 32])
def test_changes_are_counted_by_the_index_or_told(block: int) -> None:
    grid = BlockGrid(96, 64, block)
    index, mask = new_index(grid), torch.ones(grid.shape, dtype=torch.bool)
    write_index(index, grid, mask)
    write_index(index, grid, mask)
    assert index[CHANGES] == 2
    write_index(index, grid, mask, changes=7)
    assert index[CHANGES] == 7
