"""Passes over the blocks of many tensors at once, as where the host would wait for a device at each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_within, of_sum, smallest
from torch import Tensor

from mst_compile.blocks import bulk
from mst_compile.blocks.bulk import block_mean_abs, block_mean_square, block_means, outside_of_all
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.layout import as_matrix

SHAPES = [(64, 96, 32), (33, 70, 32), (5, 7, 4), (3, 4, 1), (8, 8, 8)]
STACK = (3, 64, 70)  # of matrices
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def all_at_once() -> Iterator[None]:
    """Tensors of this machine are taken as those of a GPU are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "_waits", lambda tensor: True)
        yield


def tensors(dtype: torch.dtype, seed: int = 0) -> list[tuple[Tensor, BlockGrid]]:
    generator = torch.Generator().manual_seed(seed)
    found = [
        (torch.randn(rows, cols, generator=generator).to(dtype), BlockGrid(rows, cols, block))
        for rows, cols, block in SHAPES
    ]
    return [*found, (torch.randn(STACK, generator=generator).to(dtype), BlockGrid.over(STACK, 32))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_are_those_of_each_alone(dtype: torch.dtype) -> None:
    whole = tensors(dtype)
    for (tensor, grid), mean in zip(whole, block_means(whole, "l1"), strict=True):
        assert torch.equal(mean, block_mean_abs(tensor, grid))
    for (tensor, grid), mean in zip(whole, block_means(whole), strict=True):
        assert torch.equal(mean, block_mean_square(tensor, grid))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_smallest_number_outside_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    tensor, grid = torch.zeros(40, 70, dtype=dtype), BlockGrid(40, 70, 32)
    tensor[39, 69] = smallest(dtype)
    assert outside_of_all([(tensor, grid, _none(grid))]) == [True]


@pytest.mark.parametrize("kernels", [True, False])
def test_means_are_those_of_float64(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels that there are, which take some of the tensors, and without any."""
    if not kernels:
        monkeypatch.setattr(bulk, "_native", lambda *_: None)
    whole = tensors(torch.float32)
    for (tensor, grid), mean in zip(whole, block_means(whole), strict=True):
        squares = as_matrix(tensor).double().square()
        exact = torch.stack([
            torch.stack([part.mean() for part in rows.split(grid.block, 1)]) for rows in squares.split(grid.block)
        ])  # fmt: skip
        assert_within(mean, exact, of_sum(grid.block**2) * exact)


def test_what_was_read_is_as_it_was() -> None:
    whole = tensors(torch.float32)
    before = [tensor.clone() for tensor, _ in whole]
    list(block_means(whole))
    list(block_means(whole, "l1"))
    outside_of_all([(tensor, grid, _none(grid)) for tensor, grid in whole])
    assert all(torch.equal(tensor, was) for (tensor, _), was in zip(whole, before, strict=True))


def _none(grid: BlockGrid) -> Tensor:
    return torch.zeros(grid.shape, dtype=torch.bool)


@given(
    seed=st.integers(0, 99),
    which=st.integers(0, len(SHAPES)),
    value=st.sampled_from([1.0, -1e-30, 1e-45, float("nan"), float("inf"), 0.0, -0.0]),
)
def test_one_value_outside_is_found(seed: int, which: int, value: float) -> None:
    """However small: its square may be 0."""
    generator = torch.Generator().manual_seed(seed)
    whole = []
    for tensor, grid in tensors(torch.float32, seed):
        mask = torch.rand(grid.shape, generator=generator) < 0.5
        mask[-1, -1] = False
        whole.append((torch.where(grid.expand(mask).view(grid.dims), tensor, 0.0), grid, mask))
    assert outside_of_all(whole) == [False] * len(whole)
    whole[which][0].view(-1)[-1] = value
    assert outside_of_all(whole) == [i == which and value != 0 for i in range(len(whole))]


def test_no_tensor() -> None:
    assert list(block_means([])) == []
    assert outside_of_all([]) == []
