"""Averages of squares that begin anew on a GPU: the kernel in Triton's interpreter against PyTorch's passes over whole
tensors, and its machine code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched_by_hand import interpreted
from mask_cases import block_masks, expand
from mst_compile.kernels.triton import averages
from oracles import assert_same_bits, assert_within, of_sum
from pretend_gpu import cross_compile_jit

from mst_compile.blocks.bulk import Average
from mst_compile.blocks.grid import BlockGrid
from mst_compile.state.second_moments import _first_estimate

KERNEL = averages.begin_averages  # as it is, for the compiler


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter() -> Iterator[None]:
    with interpreted(averages, "begin_averages"):
        yield


@st.composite
def cases(draw: st.DrawFn) -> Average:
    rows, cols, block = draw(st.integers(1, 140)), draw(st.integers(1, 140)), draw(st.sampled_from([32, 64, 128]))
    grid = BlockGrid(rows, cols, block)
    dtypes = draw(st.sampled_from([(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                   (torch.float16, torch.bfloat16), (torch.float64, torch.float64)]))  # fmt: skip
    wide = [torch.randn(rows, cols + draw(st.integers(0, 3))).to(dtype) for dtype in dtypes]
    blocks = draw(block_masks(*grid.shape))
    count = draw(st.sampled_from([0.0, 7.0, 90000.0]))  # of a device's or the host's own
    steps: torch.Tensor | float = torch.tensor(count) if draw(st.booleans()) else count
    return Average(wide[0][:, :cols], wide[1][:, :cols], grid, blocks, draw(st.sampled_from([0.0, 0.95, 0.999])), steps)


@settings(max_examples=15)
@given(st.lists(cases(), max_size=3), st.sampled_from([1.0, 1024.0]))
def test_any_number_of_averages_in_one_call(all_of_them: list[Average], scale: float) -> None:
    """Within their blocks as PyTorch has it, up to roundings; not a bit elsewhere, nor in the gradients."""
    before = [(a.gradient.clone(), a.average.clone()) for a in all_of_them]
    averages.begin(all_of_them, scale)
    for case, (gradient, average) in zip(all_of_them, before, strict=True):
        assert_same_bits(case.gradient, gradient)
        inside = expand(case.blocks, case.grid.rows, case.grid.cols, case.grid.block)
        assert_same_bits(case.average[~inside], average[~inside])
        _, exact = _first_estimate(case, scale)
        allowed = of_sum(case.grid.block**2) + of_sum(1, dtype=case.average.dtype) + of_sum(1)
        assert_within(case.average[inside], exact.double()[inside], allowed * exact.double()[inside])


def test_ranks_begin_with_the_same_bits_wherever_their_tensors_lie() -> None:
    grid, values = BlockGrid(70, 96, 32), torch.randn(70, 96)
    found = []
    for shift in (0, 1, 5):
        gradient, average = torch.zeros(70, 128)[:, shift : shift + 96], torch.zeros(70, 128)[:, shift : shift + 96]
        gradient.copy_(values)
        averages.begin([Average(gradient, average, grid, torch.ones(3, 3, dtype=torch.bool), 0.999, 41.0)], 1.0)
        found.append(average)
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_machine_code(dtypes: tuple[torch.dtype, torch.dtype], block: int) -> None:
    types = {"table": "*i64", "factors": "*fp32", "programs": "*i32"}
    facts = cross_compile_jit(KERNEL, types, averages.constants(*dtypes, block), **averages.OPTIONS)
    assert facts.spills == 0
    assert "FFMA" not in facts.sass.split("MUFU.RCP")[0]  # the division has its own
