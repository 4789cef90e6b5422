"""Masks to draw, expanded to elements and packed, by ways that know nothing of the code under test."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import mst_compile
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_index


def expand(mask: Tensor, rows: int, cols: int, block: int) -> Tensor:
    """Elementwise mask of a block mask, by numpy's Kronecker product."""
    return torch.from_numpy(np.kron(mask.numpy(), np.ones((block, block), dtype=bool))[:rows, :cols].copy())


def element_masks(model: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> elementwise mask, of each sparse weight of a model, where the weight is."""
    own, parameters = mst_compile.sparsifier(model), dict(model.named_parameters(remove_duplicate=False))
    grids = {n: (w.grid.rows, w.grid.cols, w.grid.block, w.shape) for n, w in own.weights.items()}
    found = {n: expand(own.masks[n], *edges).view(shape) for n, (*edges, shape) in grids.items()}
    return {n: mask.to(parameters[n].device) if n in parameters else mask for n, mask in found.items()}


@st.composite
def block_masks(draw: st.DrawFn, block_rows: int, block_cols: int) -> Tensor:
    """Empty, one block, full, random, and random with empty rows or columns."""
    kind = draw(st.sampled_from(["empty", "one", "full", "random", "empty row", "empty column"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(block_rows, block_cols, generator=generator) < draw(st.sampled_from([0.1, 0.3, 0.7]))
    if kind in ("empty", "one"):
        mask.zero_()
    if kind == "one":
        mask[draw(st.integers(0, block_rows - 1)), draw(st.integers(0, block_cols - 1))] = True
    if kind == "full":
        mask.fill_(True)
    if kind == "empty row":
        mask[draw(st.integers(0, block_rows - 1))] = False
    if kind == "empty column":
        mask[:, draw(st.integers(0, block_cols - 1))] = False
    return mask


def active_blocks(mask: Tensor) -> set[tuple[int, int]]:
    """Row and column of each active block."""
    return {(int(r), int(c)) for r, c in zip(*np.nonzero(mask.numpy()), strict=True)}


def scores_without_ties(rows: int, cols: int, data: st.DataObject) -> Tensor:
    """A score for each block: the numbers from 1, shuffled."""
    order = list(range(1, rows * cols + 1))
    random.Random(data.draw(st.integers(0, 2**31))).shuffle(order)
    return torch.tensor(order, dtype=torch.float32).view(rows, cols)


def index_of(mask: Tensor, rows: int, cols: int, block: int, *, dense_grad: bool = False) -> Tensor:
    grid = BlockGrid(rows, cols, block)
    index = new_index(grid)
    write_index(index, grid, mask, dense_grad=dense_grad)
    return index
