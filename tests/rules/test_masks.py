"""Densities, masks, drop and grow, and the packed index, against independent implementations on sets and loops."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from helpers import block_masks, expand, index_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mst_compile.blocks.bulk import block_mean_square, mask_like, zero_blocks_, zero_inactive_
from mst_compile.blocks.grid import HEADER, BlockGrid
from mst_compile.blocks.index import CHANGES, DENSE_GRAD, NNZ, new_index, read_mask, write_index
from mst_compile.rules import masks
from mst_compile.rules.density import active_count, erdos_renyi, uniform
from mst_compile.rules.growth import Mixed
from mst_compile.rules.guard import backbone, coverage

Block = tuple[int, int]

# -- densities ---------------------------------------------------------------------------------------------------------

shape_lists = st.lists(st.tuples(st.integers(4, 4096), st.integers(4, 4096)), min_size=1, max_size=12)


@given(shape_lists, st.floats(0, 0.999))
def test_erdos_renyi_is_exact_and_proportional(shapes: list[tuple[int, int]], sparsity: float) -> None:
    densities = erdos_renyi(shapes, sparsity)
    total = sum(r * c for r, c in shapes)
    kept = sum(d * r * c for d, (r, c) in zip(densities, shapes, strict=True))
    assert kept == pytest.approx((1 - sparsity) * total, rel=1e-6)
    assert all(0 < d <= 1 + 1e-12 for d in densities)
    raw = [(r + c) / (r * c) for r, c in shapes]
    factors = [d / q for d, q in zip(densities, raw, strict=True) if d < 1]
    if factors:
        assert max(factors) == pytest.approx(min(factors), rel=1e-9)
        # A layer is dense only where the common factor would make it so, or nearly: others were scaled up after it.
        assert all(factors[0] * q >= 1 - 1e-9 for d, q in zip(densities, raw, strict=True) if d >= 1)


@given(shape_lists, st.floats(0, 0.999))
def test_uniform_densities(shapes: list[tuple[int, int]], sparsity: float) -> None:
    assert uniform(shapes, sparsity) == [1 - sparsity] * len(shapes)


def test_small_layers_are_denser() -> None:
    small, large = erdos_renyi([(64, 64), (256, 256)], 0.9)
    assert small == pytest.approx(4 * large)
    assert erdos_renyi([(4, 4), (1024, 1024)], 0.9)[0] == 1.0


# -- masks -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40))
def test_backbone_touches_every_row_and_column(rows: int, cols: int) -> None:
    spine = backbone((rows, cols))
    assert spine.dtype == torch.bool
    assert int(spine.sum()) == max(rows, cols)
    assert bool(spine.any(0).all())
    assert bool(spine.any(1).all())


@given(st.floats(0, 1), st.integers(1, 500), st.data())
def test_active_count(density: float, blocks: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(0, blocks))
    count = active_count(density, blocks, least)
    assert least <= count <= blocks
    assert count == least or abs(count - density * blocks) <= 0.5


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_first_masks(rows: int, cols: int, data: st.DataObject) -> None:
    spine = backbone((rows, cols))
    count = data.draw(st.integers(max(rows, cols), rows * cols))
    mask = masks.random_mask(spine, count, masks.generator(0, 0, "w"))
    assert int(mask.sum()) == count
    assert bool((mask | ~spine).all())
    magnitude = distinct(rows, cols, data)
    by_size = masks.magnitude_mask(spine, count, magnitude)
    expected = blocks(spine)
    others = sorted(blocks(~spine), key=lambda b: -magnitude[b].item())
    assert blocks(by_size) == expected | set(others[: count - len(expected)])


def test_random_masks_are_uniform() -> None:
    """Every block outside the backbone is as likely as another: 6 sigma of the binomial."""
    spine = backbone((6, 6))
    hits = sum(masks.random_mask(spine, 16, masks.generator(s, 0, "w")).int() for s in range(1000))
    p = 10 / 30
    assert bool(((hits[~spine] - 1000 * p).abs() < 6 * math.sqrt(1000 * p * (1 - p))).all())


# -- drop and grow -----------------------------------------------------------------------------------------------------


def blocks(mask: Tensor) -> set[Block]:
    return {(int(r), int(c)) for r, c in zip(*np.nonzero(mask.numpy()), strict=True)}


def distinct(rows: int, cols: int, data: st.DataObject) -> Tensor:
    """Scores without ties."""
    order = list(range(1, rows * cols + 1))
    random.Random(data.draw(st.integers(0, 2**31))).shuffle(order)
    return torch.tensor(order, dtype=torch.float32).view(rows, cols)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.data())
def test_update_mask(
    rows: int, cols: int, drop_fraction: float, share: float, with_gradient: bool, data: st.DataObject
) -> None:
    spine = backbone((rows, cols))
    least, most = max(rows, cols), rows * cols
    mask = masks.random_mask(spine, data.draw(st.integers(least, most)), masks.generator(1, 0, "w"))
    count = data.draw(st.integers(least, most))
    magnitude, gradient = distinct(rows, cols, data), distinct(rows, cols, data)
    safe = coverage(mask, magnitude) if data.draw(st.booleans()) else spine
    before = mask.clone(), safe.clone(), magnitude.clone(), gradient.clone()

    def event() -> Tensor:
        g = masks.generator(0, 7, "w")
        return masks.update_mask(
            mask, safe, magnitude, gradient if with_gradient else None, count, drop_fraction, Mixed(share), g
        )

    new = event()
    assert torch.equal(new, event())
    assert all(torch.equal(a, b) for a, b in zip(before, (mask, safe, magnitude, gradient), strict=True))
    assert int(new.sum()) == max(count, int(safe.sum()))
    if count == most:
        return

    active, unharmed = blocks(mask), blocks(safe)
    to_drop = max(round(drop_fraction * len(active)), len(active) - count)
    kept = active - set(sorted(active - unharmed, key=lambda b: magnitude[b].item())[:to_drop])
    grow = max(0, count - len(kept))
    by_gradient = round(grow * share) if with_gradient else 0
    free = {(r, c) for r in range(rows) for c in range(cols)} - kept
    best = set(sorted(free, key=lambda b: -gradient[b].item())[:by_gradient])

    grown = blocks(new) - kept
    assert unharmed <= kept <= blocks(new)
    assert best <= grown
    assert len(grown - best) == grow - by_gradient


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.data())
def test_coverage(rows: int, cols: int, density: float, data: st.DataObject) -> None:
    """The largest active block of each row and column, and no other; rows and columns may be empty."""
    mask = torch.rand(rows, cols, generator=masks.generator(0, 0, str(data.draw(st.integers(0, 99))))) < density
    magnitude = distinct(rows, cols, data)
    expected = set()
    for dim, count in ((0, rows), (1, cols)):
        for i in range(count):
            line = [b for b in blocks(mask) if b[dim] == i]
            expected |= {max(line, key=lambda b: magnitude[b].item())} if line else set()
    assert blocks(coverage(mask, magnitude)) == expected


def test_coverage_of_blocks_that_have_just_grown() -> None:
    """They are zero, and all that a row may have."""
    mask = torch.eye(5, dtype=torch.bool)
    assert torch.equal(coverage(mask, torch.zeros(5, 5)), mask)


def test_three_of_four_grow_by_gradient() -> None:
    spine = torch.eye(16, dtype=torch.bool)
    magnitude = torch.arange(1.0, 257).view(16, 16)
    gradient = torch.arange(256.0, 0, -1).view(16, 16)
    mask = masks.random_mask(spine, 116, masks.generator(0, 0, "w"))
    new = masks.update_mask(mask, spine, magnitude, gradient, 116, 40 / 116, Mixed(), masks.generator(0, 1, "w"))
    dropped = set(sorted(blocks(mask & ~spine), key=lambda b: magnitude[b].item())[:40])
    kept = blocks(mask) - dropped
    best = sorted(blocks(torch.ones_like(mask)) - kept, key=lambda b: -gradient[b].item())
    grown = blocks(new) - kept
    assert len(grown) == 40
    assert set(best[:30]) <= grown
    assert best[30] not in grown or set(best[30:40]) != grown - set(best[:30]), "the last ten are random"


def test_randomness_is_a_function_of_seed_step_and_name() -> None:
    def draw(seed: int, step: int, name: str) -> list[float]:
        return torch.rand(8, generator=masks.generator(seed, step, name)).tolist()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(0, 1, "a")
    assert torch.equal(torch.get_rng_state(), state), "the user's generator is not touched"
    torch.manual_seed(2)
    assert draw(0, 1, "a") == first
    assert len({tuple(draw(*k)) for k in [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (1, 0, "a")]}) == 5


# -- the packed index --------------------------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 4, 8, 16, 32, 64, 128]), st.data())
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
    csr = sorted(blocks(mask))
    csc = sorted(blocks(mask), key=lambda b: (b[1], b[0]))
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


# -- bulk operations on blocks -----------------------------------------------------------------------------------------

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16])


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 4, 8, 32, 64, 128]), dtypes, st.data())
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
    torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(wide[:, cols:], around)


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 4, 8, 32, 64, 128]), dtypes, st.booleans())
def test_block_mean_square(rows: int, cols: int, block: int, dtype: torch.dtype, transposed: bool) -> None:
    grid = BlockGrid(rows, cols, block)
    tensor = torch.randn(rows, cols).to(dtype)
    tensor = tensor.t().clone().t() if transposed else tensor
    found = block_mean_square(tensor, grid)
    assert found.dtype == torch.float32
    assert found.shape == grid.shape
    for r in range(grid.block_rows):
        for c in range(grid.block_cols):
            part = tensor[r * block : (r + 1) * block, c * block : (c + 1) * block].double()
            # A sum of n squares in float32 is off by at most n roundings.
            bound = (part.numel() + 3) * torch.finfo(torch.float32).eps
            assert found[r, c].item() == pytest.approx(part.square().mean().item(), rel=bound)


def test_large_weights_are_zeroed_in_parts() -> None:
    grid = BlockGrid(9001, 5, 4)
    mask = torch.rand(grid.shape) < 0.5
    tensor = torch.ones(9001, 5, dtype=torch.float64)
    zero_inactive_(tensor, grid, mask, None)
    assert torch.equal(tensor.bool(), expand(mask, 9001, 5, 4))


@given(rows=st.integers(1, 40), cols=st.integers(1, 40), block=st.sampled_from((1, 4, 8)), seed=st.integers(0, 99))
def test_zero_blocks_touches_the_given_blocks_alone(rows: int, cols: int, block: int, seed: int) -> None:
    grid = BlockGrid(rows, cols, block)
    blocks = torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    tensor = torch.randn(rows, cols)
    want = tensor.masked_fill(grid.expand(blocks), 0)
    zero_blocks_(tensor, grid, blocks)
    assert torch.equal(tensor, want)
