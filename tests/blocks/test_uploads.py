"""What goes from the host to a device: masks once, not at every step, and the indexes of all weights together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import block_masks

from mst_compile.blocks import bulk
from mst_compile.blocks import index as indexes
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import (
    CHANGES,
    DENSE_GRAD,
    Content,
    new_index,
    write_dense_grad,
    write_index,
    write_indexes,
)


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


@given(st.data())
def test_indexes_that_go_together_are_those_of_each_alone(data: st.DataObject) -> None:
    """Also of stacks and of fine blocks, in the memory that each had, of which autograd knows that it was written."""
    contents, alone = [], []
    for _ in range(data.draw(st.integers(0, 4))):
        stack = data.draw(st.sampled_from([(), (1,), (3,)]))
        block = data.draw(st.sampled_from([4, 32, 64]))
        rows = block * data.draw(st.integers(1, 4)) if stack else data.draw(st.integers(1, 200))
        grid = BlockGrid.over((*stack, rows, data.draw(st.integers(1, 200))), block)
        mask, told = data.draw(block_masks(*grid.shape)), (data.draw(st.booleans()), data.draw(st.integers(0, 9)))
        index = new_index(grid)
        write_index(index, grid, torch.ones(grid.shape, dtype=torch.bool))
        contents.append(Content(index, grid, mask, *told))
        alone.append(new_index(grid))
        write_index(alone[-1], grid, mask, dense_grad=told[0], changes=told[1])
    before = [(c.to.data_ptr(), c.to._version) for c in contents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexes, "_goes_far", lambda index, mask: True)
        write_indexes(contents)
    assert all(torch.equal(content.to, one) for content, one in zip(contents, alone, strict=True))
    assert [(c.to.data_ptr(), c.to._version) for c in contents] == [(at, v + 1) for at, v in before]


def test_the_word_of_many_indexes() -> None:
    """Of each matrix of a stack, and nothing else."""
    held = [new_index(BlockGrid.over(shape, 32)) for shape in ((64, 96), (3, 32, 70))]
    for wanted in (True, True, False, False, True):
        versions = [index._version for index in held]
        write_dense_grad(held, wanted)
        assert all(index._version > version for index, version in zip(held, versions, strict=True))
        for index in held:
            assert (index[..., DENSE_GRAD] == int(wanted)).all()
            assert int(index.sum()) == int(wanted) * (1 if index.dim() == 1 else len(index))
    write_dense_grad([], True)
