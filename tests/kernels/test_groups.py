"""Products with the matrices of a stack in one call: the same as one by one, whatever the groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from cpu_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, table
from mst_compile.kernels.cpu.groups import grad_weight_groups, spmm_groups
from mst_compile.kernels.cpu.library import loaded
from other_libraries import OTHERS, library
from torch import Tensor

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")
F32 = torch.float32
Groups = list[tuple[int, int, int]]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stack_of(cases: list[Case], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices ``[E, rows, cols]`` and their indices."""
    return torch.stack([c.randn(c.rows, c.cols, dtype) for c in cases]), torch.stack([c.index for c in cases])


def compare(isa: str | None, sizes: list[int], block: int, dtypes: tuple[torch.dtype, torch.dtype], seed: int) -> None:
    """Every group bit for bit as the single product, rows of none and matrices of none untouched."""
    lib = library(isa) if isa else loaded()
    cases = [
        Case(2 * block + 3, 3 * block + 2, 1, block, d, seed + e)
        for e, d in zip(range(len(sizes)), itertools.cycle((0.6, 0.0, 1.0, 0.2)), strict=False)
    ]
    stack, index = stack_of(cases, dtypes[1])
    ends = list(itertools.accumulate(sizes))
    groups: Groups = [(e, end - size, end) for e, (size, end) in enumerate(zip(sizes, ends, strict=True))]
    rows, cols = stack.shape[1:]
    m = sum(sizes) + 2
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for by_rows in (True, False):
            outputs, reduction = (rows, cols) if by_rows else (cols, rows)
            x = cases[0].randn(m, reduction, dtypes[0], pad=3)
            out = torch.full((m, outputs + 1), 7.0, dtype=dtypes[0])[:, :outputs]
            want = out.clone()
            spmm_groups(x, stack, index, groups, block, by_rows, out, lib)
            for e, start, end in groups:
                (lib or cpu.library.loaded()).spmm(
                    x[start:end], stack[e], None, index[e], block, by_rows, want[start:end]
                )
            torch.testing.assert_close(out, want, rtol=0, atol=0)
        a, b = cases[0].randn(m, rows, dtypes[0], pad=1), cases[0].randn(m, cols, dtypes[0])
        got = torch.full((len(sizes), rows, cols), 7.0, dtype=dtypes[1])
        expected = got.clone()
        grad_weight_groups(a, b, index, groups[1:], block, got, lib)
        for e, start, end in groups[1:]:
            lib.grad_weight(a[start:end], b[start:end], index[e], block, expected[e])
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert (got[0] == 7).all()
        assert not got[1].any(), "without rows, or without active blocks"


@pytest.mark.parametrize("isa", [*build.supported_isas(), *OTHERS])
@pytest.mark.parametrize("block", table.BLOCKS)
def test_groups_of_every_instruction_set(isa: str, block: int) -> None:
    for dtypes in table.PRODUCTS:
        compare(isa, [5, 0, 130, 1], block, dtypes, seed=block)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0, 1, 2, 9, 64, 200]), min_size=2, max_size=9), st.integers(0, 2**20))
def test_groups_of_any_sizes(sizes: list[int], seed: int) -> None:
    compare(None, sizes, 8, (torch.bfloat16, F32), seed)


def test_what_is_no_group_is_refused() -> None:
    cases = [Case(16, 16, 1, 8, 0.5, seed) for seed in range(2)]
    stack, index = stack_of(cases, F32)
    x, out = torch.randn(6, 16), torch.full((6, 16), 7.0)
    for groups in ([(2, 0, 6)], [(-1, 0, 6)], [(0, 0, 7)], [(0, 4, 3)], [(0, -1, 3)]):
        with pytest.raises(ValueError, match=r"groups .* are not all of 2 matrices and 6 rows"):
            spmm_groups(x, stack, index, groups, 8, True, out)
        with pytest.raises(ValueError, match=r"groups .* are not all of 2 matrices and 6 rows"):
            grad_weight_groups(x, x, index, groups, 8, stack)
    fits = [(0, 0, 6)]
    with pytest.raises(ValueError, match="index of the stack must be contiguous int32"):
        spmm_groups(x, stack, index[:1], fits, 8, True, out)
    with pytest.raises(ValueError, match="index of the stack must be contiguous int32"):
        grad_weight_groups(x, x, index.long(), fits, 8, stack)
    with pytest.raises(ValueError, match="the stack whole"):
        spmm_groups(x, stack.mT, index, fits, 8, True, out)
    with pytest.raises(ValueError, match="do not give out"):
        spmm_groups(x[:, :8], stack, index, fits, 8, True, out)
    with pytest.raises(ValueError, match="the stack out whole"):
        grad_weight_groups(x, x, index, fits, 8, stack.mT)
    with pytest.raises(ValueError, match="do not give matrices"):
        grad_weight_groups(x, x[:5], index, fits, 8, stack)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        spmm_groups(x.double(), stack, index, fits, 8, True, out.double())
    assert (out == 7).all()


def test_an_unknown_block_is_an_error_of_the_kernel() -> None:
    """Refused by the product itself, among others that run."""
    index = torch.zeros(2, 8 + 2 + 1 + 2 + 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="unsupported block"):
        spmm_groups(torch.zeros(4, 3), torch.zeros(2, 3, 3), index, [(0, 0, 2), (1, 2, 4)], 3, True, torch.zeros(4, 3))
