"""Operations on all blocks of a tensor at once, against elementwise masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import block_masks, expand, index_of
from oracles import assert_same_bits, assert_within, block_sums, of_rounding

from mst_compile.blocks import bulk
from mst_compile.blocks.bulk import block_mean_abs, block_mean_square, zero_blocks_, zero_inactive_
from mst_compile.blocks.grid import BlockGrid

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16])


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4, 8, 32, 64, 128]), dtypes, st.data())
def test_zero_inactive(rows: int, cols: int, block: int, dtype: torch.dtype, data: st.DataObject) -> None:
    grid = BlockGrid(rows, cols, block)
    mask = data.draw(block_masks(*grid.shape))
    wide = torch.randn(rows, cols + 3).to(dtype)
    tensor = {"whole": wide[:, :cols].clone(), "slice": wide[:, :cols], "transposed": wide[:, :cols].t().clone().t()}[
        data.draw(st.sampled_from(["whole", "slice", "transposed"]))
    ]
    tensor[0, 0] = torch.nan
    keep, around = expand(mask, rows, cols, block), wide[:, cols:].clone()
    expected = torch.where(keep, tensor, 0)
    zero_inactive_(tensor, grid, mask, index_of(mask, rows, cols, block) if data.draw(st.booleans()) else None)
    assert_same_bits(tensor, expected)
    assert torch.equal(wide[:, cols:], around)


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4, 8, 32, 64, 128]), dtypes, st.booleans())
def test_block_mean_square(rows: int, cols: int, block: int, dtype: torch.dtype, transposed: bool) -> None:
    grid = BlockGrid(rows, cols, block)
    tensor = torch.randn(rows, cols).to(dtype)
    tensor = tensor.t().clone().t() if transposed else tensor
    found = block_mean_square(tensor, grid)
    assert found.dtype == torch.float32
    assert found.shape == grid.shape
    size = block_sums(torch.ones(rows, cols), block)
    exact = block_sums(tensor.double().square(), block) / size
    assert_within(found, exact, of_rounding(torch.float32) * (size + 3) * exact)


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4, 8, 32, 64, 128]), dtypes, st.booleans())
def test_block_mean_abs(rows: int, cols: int, block: int, dtype: torch.dtype, transposed: bool) -> None:
    grid = BlockGrid(rows, cols, block)
    tensor = torch.randn(rows, cols).to(dtype)
    tensor = tensor.t().clone().t() if transposed else tensor
    before = tensor.clone()
    found = block_mean_abs(tensor, grid)
    assert torch.equal(tensor, before)
    assert (found.dtype, found.shape) == (torch.float32, grid.shape)
    size = block_sums(torch.ones(rows, cols), block)
    exact = block_sums(tensor.double().abs(), block) / size
    assert_within(found, exact, of_rounding(torch.float32) * (size + 3) * exact)


def test_large_weights_are_zeroed_in_parts() -> None:
    grid = BlockGrid(9001, 5, 4)
    mask = torch.rand(grid.shape) < 0.5
    tensor = torch.ones(9001, 5, dtype=torch.float64)
    zero_inactive_(tensor, grid, mask, None)
    assert torch.equal(tensor.bool(), expand(mask, 9001, 5, 4))


@given(rows=st.integers(1, 40), cols=st.integers(1, 40), block=st.sampled_from((1, 2, 4, 8)), seed=st.integers(0, 99))
def test_zero_blocks_touches_the_given_blocks_alone(rows: int, cols: int, block: int, seed: int) -> None:
    grid = BlockGrid(rows, cols, block)
    blocks = torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    tensor = torch.randn(rows, cols)
    want = tensor.masked_fill(grid.expand(blocks), 0)
    zero_blocks_(tensor, grid, blocks)
    assert torch.equal(tensor, want)


def test_kernels_are_asked_only_where_all_is_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that read an index of another device by its address would read anything."""

    class Elsewhere:
        def takes(self, tensor: torch.Tensor, grid: BlockGrid) -> bool:
            raise AssertionError("asked")

    monkeypatch.setitem(bulk._kernels, "cpu", Elsewhere())
    grid, mask = BlockGrid(64, 64, 32), torch.eye(2, dtype=torch.bool)
    index = index_of(mask, 64, 64, 32)
    with pytest.raises(AssertionError, match="asked"):
        zero_inactive_(torch.ones(64, 64), grid, mask, index)
    monkeypatch.setattr(bulk, "is_plain", lambda tensor: True)  # as a tensor on a second device is
    tensor = torch.ones(64, 64)
    zero_inactive_(tensor, grid, mask, index.to("meta"))
    assert torch.equal(tensor, grid.expand(mask).float())
