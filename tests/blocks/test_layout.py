"""Which part of a matrix a rank holds, against cutting one; which blocks reach into it, against counting elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import block_masks, expand
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from mst_compile.blocks.layout import Part, part_of, reaching


def cut(whole: Tensor, pieces: int, which: int, dim: int) -> Tensor:
    """As torch.chunk does, with empty pieces at the end."""
    parts = list(whole.chunk(pieces, dim))
    return parts[which] if which < len(parts) else whole.narrow(dim, whole.shape[dim], 0)


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_parts_are_those_that_chunks_leave(rows: int, cols: int, sizes: list[int], data: st.DataObject) -> None:
    """Cut from left to right, or by the first dimension of the mesh last, as fully_shard does over others."""
    whole = torch.arange(rows * cols).view(rows, cols)
    coordinate = [data.draw(st.integers(0, size - 1)) for size in sizes]
    dims = [data.draw(st.sampled_from([None, 0, 1])) for _ in sizes]
    last = dims[0] is not None and data.draw(st.booleans())
    found = whole
    for i in [*range(1, len(sizes)), 0] if last else range(len(sizes)):
        if dims[i] is not None:
            found = cut(found, sizes[i], coordinate[i], dims[i])
    placements: list[Placement] = [Replicate() if dim is None else Shard(dim) for dim in dims]
    before = int(np.prod([s for s, d in zip(sizes[1:], dims[1:], strict=True) if d == dims[0]]))
    if last and before > 1:
        placements[0] = _StridedShard(dims[0], split_factor=before)
    part = part_of((rows, cols), placements, sizes, coordinate)
    assert part is not None
    assert (part.rows, part.cols) == tuple(found.shape)
    assert torch.equal(part.of(whole), found)


@pytest.mark.parametrize(
    ("shape", "placements", "sizes"),
    [
        ((8, 8), [_StridedShard(0, split_factor=2)], [2]),  # every other pair of rows
        ((8, 8), [_StridedShard(0, split_factor=3), Shard(0)], [2, 2]),
        ((8, 8), [_StridedShard(1, split_factor=2), Shard(0)], [2, 2]),
        ((8,), [Shard(0)], [2]),
        ((8, 8, 8), [Shard(1)], [2]),
        ((8, 8, 8), [Shard(2)], [2]),
        ((8, 8, 8), [Shard(0), Shard(1)], [2, 2]),
        ((8, 8, 8), [_StridedShard(0, split_factor=2)], [2]),
        ((2, 8, 8, 8), [Shard(0)], [2]),
    ],
)
def test_what_is_no_rectangle(shape: tuple[int, ...], placements: list[Placement], sizes: list[int]) -> None:
    assert part_of(shape, placements, sizes, [0] * len(sizes)) is None


def test_of_a_stack_a_rank_holds_whole_matrices() -> None:
    assert part_of((5, 8, 4), [Shard(0)], [2], [0]) == Part(0, 0, 24, 4)
    assert part_of((5, 8, 4), [Shard(0)], [2], [1]) == Part(24, 0, 16, 4)
    assert part_of((5, 8, 4), [Replicate(), Shard(0)], [2, 4], [1, 3]) == Part(40, 0, 0, 4)
    assert part_of((5, 8, 4), [Partial()], [2], [1]) == Part(0, 0, 40, 4)


def test_partial_sums_are_whole() -> None:
    assert part_of((6, 4), [Partial(), Shard(1)], [2, 2], [1, 1]) == Part(0, 2, 6, 2)


@given(rows=st.integers(1, 40), cols=st.integers(1, 40), block=st.sampled_from([1, 2, 4, 8, 16]), data=st.data())
def test_reaching_blocks_are_those_with_an_active_element(
    rows: int, cols: int, block: int, data: st.DataObject
) -> None:
    row, col = data.draw(st.integers(0, rows)), data.draw(st.integers(0, cols))
    part = Part(row, col, data.draw(st.integers(0, rows - row)), data.draw(st.integers(0, cols - col)))
    mask = data.draw(block_masks(-(-rows // block), -(-cols // block)))
    grid = part.grid(block)
    inside = part.of(expand(mask, rows, cols, block))
    found = torch.zeros(grid.shape, dtype=torch.bool)
    for r, c in inside.nonzero().tolist():
        found[r // block, c // block] = True
    reached = reaching(mask, part, block)
    assert reached.shape == found.shape
    assert torch.equal(reached, found)
    if row % block == col % block == 0 and part.rows and part.cols:
        assert torch.equal(expand(reached, part.rows, part.cols, block), inside)
