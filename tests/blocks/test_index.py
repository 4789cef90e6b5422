"""The packed index of a mask, word for word."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import active_blocks, block_masks, expand, index_of

from mst_compile.blocks.bulk import mask_like
from mst_compile.blocks.grid import HEADER, BlockGrid
from mst_compile.blocks.index import CHANGES, DENSE_GRAD, NNZ, new_index, read_mask, write_index


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]), st.data())
def test_index_round_trip_and_layout(rows: int, cols: int, block: int, data: st.DataObject) -> None:
    grid = BlockGrid(rows, cols, block)
    R, C = math.ceil(rows / block), math.ceil(cols / block)
    assert grid.shape == (R, C)
    assert grid.edge == (rows - block * (R - 1), cols - block * (C - 1))

    mask = data.draw(block_masks(R, C))
    assert grid.count_elements(mask) == int(expand(mask, rows, cols, block).sum())
    dense_grad = data.draw(st.booleans())
    index = new_index(grid)
    address, version = index.data_ptr(), index._version
    write_index(index, grid, ~mask)
    write_index(index, grid, mask, dense_grad=dense_grad)  # what the first one left must be gone
    assert (index.data_ptr(), index.dtype, index._version) == (address, torch.int32, version + 2)
    assert torch.equal(read_mask(index, grid), mask)
    assert torch.equal(grid.expand(mask), expand(mask, rows, cols, block))
    assert torch.equal(mask_like(index, grid), expand(mask, rows, cols, block))

    words = index.tolist()
    csr = sorted(active_blocks(mask))
    csc = sorted(active_blocks(mask), key=lambda b: (b[1], b[0]))
    n = len(csr)
    assert (words[NNZ], words[DENSE_GRAD], words[CHANGES]) == (n, dense_grad, 2)
    at = HEADER
    for length, ordered, major in ((R, csr, 0), (C, csc, 1)):
        assert words[at : at + length + 1] == [sum(b[major] < k for b in ordered) for k in range(length + 1)]
        at += length + 1
        assert words[at : at + R * C] == [b[1 - major] for b in ordered] + [0] * (R * C - n)
        at += R * C
    assert (at == len(words)) == (block < 32), "coarse blocks have a part for the GPU behind"


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([32, 64, 128]), st.data())
def test_index_part_for_the_gpu(rows: int, cols: int, block: int, data: st.DataObject) -> None:
    grid = BlockGrid(rows, cols, block)
    R, C = grid.shape
    mask = data.draw(block_masks(R, C))
    words = index_of(mask, rows, cols, block).tolist()
    end = HEADER + (R + 1) + R * C + (C + 1) + R * C
    assert words[end : end + R * C] == mask.int().flatten().tolist()
    end += R * C
    whole, taken = {"lines": 1}, [(True, False), (False, False)]
    if block < 128:
        whole["union"] = 128 // block
        taken += [(True, True), (False, True)]
    for by_rows, union in taken:
        lines = grid.lines(by_rows, union=union)
        oriented = mask if by_rows else mask.t()
        step = whole["union" if union else "lines"]
        groups = [oriented[i : i + step].any(0) for i in range(0, len(oriented), step)]
        sets = [g.nonzero()[:, 0].tolist() for g in groups]
        assert (lines.count, lines.length) == (len(sets), oriented.shape[1])
        pointers = words[lines.ptr : lines.ptr + lines.count + 1]
        assert [words[lines.idx + a : lines.idx + b] for a, b in itertools.pairwise(pointers)] == sets
        order = words[lines.order : lines.order + lines.count]
        assert sorted(order) == list(range(len(sets)))
        lengths = [len(sets[i]) for i in order]
        assert lengths == sorted(lengths, reverse=True)
    parts = [grid.lines(*t[:1], union=t[1]) for t in taken]
    used = [span for p in parts for span in ((p.ptr, p.count + 1), (p.idx, p.count * p.length), (p.order, p.count))]
    used = sorted([(first, first + size) for first, size in [*used, (grid.active, grid.blocks)]])
    assert used[-1][1] == len(words)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(used)), "no part lies on another"
