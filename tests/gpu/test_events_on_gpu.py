"""What a topology event reads of all weights and writes for them, on the card."""

from __future__ import annotations

import mst_compile.lowering.cuda  # noqa: F401  (registers its kernels)
import pytest
import torch
from mask_cases import expand, index_of
from oracles import assert_same_bits, assert_within, of_sum, smallest
from sum_cases import measured
from torch import Tensor

from mst_compile.blocks.bulk import Average, begin_averages, block_means, outside_of_all
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import Content, new_index, write_dense_grad, write_indexes
from mst_compile.state.second_moments import _first_estimate

SIZES = ((2304, 768), (50257, 64), (199, 129), (96, 40))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mask_of(grid: BlockGrid) -> Tensor:
    return torch.rand(grid.shape, generator=torch.Generator().manual_seed(1)) < 0.3


def whole_on(device: torch.device, block: int) -> list[tuple[Tensor, BlockGrid]]:
    """Of every size and dtype, contiguous and not."""
    found = []
    for i, (rows, cols) in enumerate(SIZES):
        for j, dtype in enumerate(DTYPES):
            wide = torch.randn(rows, cols + (i + j) % 3, device=device).to(dtype)
            found.append((wide[:, :cols], BlockGrid(rows, cols, block)))
    return found


@pytest.mark.rank(1)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("magnitude", ["l1", "l2"])
def test_sums_of_all_blocks(block: int, magnitude: str, device: torch.device) -> None:
    """To the bit in the order that the kernel says, twice; and as near to float64 as a sum can be."""
    whole = whole_on(device, block)
    found = list(block_means(whole, magnitude))
    for one, again in zip(found, block_means(whole, magnitude), strict=True):
        assert_same_bits(one, again)
    kind = "magnitudes" if magnitude == "l1" else "squares"
    for (tensor, grid), mean in zip(whole, found, strict=True):
        if device.type == "cuda":
            assert_same_bits(mean, grid.mean_of_sums_(measured(tensor.cpu(), grid, kind)))
        exact = grid.mean_of_sums_(measured(tensor.cpu(), grid, kind).double())
        assert_within(mean, exact, 2 * of_sum(block * block) * exact)


@pytest.mark.rank(1)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_what_stands_outside(block: int, device: torch.device) -> None:
    """One number, the smallest that there is, in the last block."""
    items = []
    for tensor, grid in whole_on(device, block):
        mask = mask_of(grid)
        mask[-1, -1] = False
        keep = expand(mask, grid.rows, grid.cols, block).to(device)
        items.append((torch.where(keep, tensor, torch.zeros_like(tensor)), grid, mask))
    nothing = [False if device.type == "cuda" else None] * len(items)
    assert outside_of_all(items) == nothing
    for i, (tensor, grid, mask) in enumerate(items):
        tensor[-1, -1] = smallest(tensor.dtype)
        if device.type == "cuda":
            assert outside_of_all([(tensor, grid, mask)]) == [True], i


@pytest.mark.rank(1)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("on_device", [True, False])
def test_second_moments_of_grown_blocks(block: int, on_device: bool, device: torch.device) -> None:
    averages, before = [], []
    for gradient, grid in whole_on(device, block):
        steps = torch.tensor(900.0, device=device if on_device else "cpu")
        average = torch.randn(grid.rows, grid.cols, device=device)
        averages.append(Average(gradient, average, grid, mask_of(grid), 0.999, steps))
        before.append(average.clone())
    left = begin_averages(averages, 2.0)
    assert len(left) == (0 if device.type == "cuda" else len(averages))
    for case, average in zip(averages, before, strict=True):
        inside, begun = _first_estimate(case, 2.0)
        assert_same_bits(case.average[~inside].cpu(), average[~inside].cpu())
        if not left:
            exact = begun.double()[inside].cpu()
            assert_within(case.average[inside].cpu(), exact, 2 * of_sum(block * block) * exact)


@pytest.mark.rank(1)
def test_indexes_of_all_weights(device: torch.device) -> None:
    """In the memory that they had, while the pinned memory that they came from is used again."""
    grids = [
        BlockGrid(rows, cols, block) for rows, cols in SIZES for block in (32, 64)
    ] * 9  # more than one launch takes
    indexes = [new_index(grid, device) for grid in grids]
    addresses = [index.data_ptr() for index in indexes]
    for turn in range(3):
        masks = [mask_of(grid).roll(turn, 0) for grid in grids]
        rows = zip(indexes, grids, masks, strict=True)
        write_indexes([Content(index, grid, mask, turn == 1, turn) for index, grid, mask in rows])
        write_dense_grad(indexes, True)
        if turn < 2:
            write_dense_grad(indexes, False)
        for index, grid, mask in zip(indexes, grids, masks, strict=True):
            right = index_of(mask, grid.rows, grid.cols, grid.block, dense_grad=turn == 2)
            right[2] = turn
            assert torch.equal(index.cpu(), right)
    assert [index.data_ptr() for index in indexes] == addresses
