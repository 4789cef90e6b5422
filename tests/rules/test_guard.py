"""Guards, which keep every row and column of blocks alive, against sets and loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import active_blocks, scores_without_ties

from mst_compile.rules import masks
from mst_compile.rules.guard import backbone, coverage


@given(st.integers(1, 40), st.integers(1, 40))
def test_backbone_touches_every_row_and_column(rows: int, cols: int) -> None:
    spine = backbone((rows, cols))
    assert spine.dtype == torch.bool
    assert int(spine.sum()) == max(rows, cols)
    assert bool(spine.any(0).all())
    assert bool(spine.any(1).all())


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.data())
def test_coverage(rows: int, cols: int, density: float, data: st.DataObject) -> None:
    """The largest active block of each row and column, and no other; rows and columns may be empty."""
    mask = torch.rand(rows, cols, generator=masks.generator(0, 0, str(data.draw(st.integers(0, 99))))) < density
    magnitude = scores_without_ties(rows, cols, data)
    expected = set()
    for dim, count in ((0, rows), (1, cols)):
        for i in range(count):
            line = [b for b in active_blocks(mask) if b[dim] == i]
            expected |= {max(line, key=lambda b: magnitude[b].item())} if line else set()
    assert active_blocks(coverage(mask, magnitude)) == expected


def test_coverage_of_blocks_that_have_just_grown() -> None:
    """They are zero, and all that a row may have."""
    mask = torch.eye(5, dtype=torch.bool)
    assert torch.equal(coverage(mask, torch.zeros(5, 5)), mask)
