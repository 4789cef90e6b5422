"""Random block-sparse products on the CPU kernels, checked against float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from mst_compile.kernels.cpu import table
from mst_compile.kernels.cpu.library import Library
from oracles import Exact, assert_within, of_rounding, of_sum, product, total
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_index
from mst_compile.blocks.packed import pack

F32 = torch.float32


class Case:
    """A random weight, its mask and index, and operands that are views into wider buffers."""

    def __init__(self, rows: int, cols: int, m: int, block: int, density: float, seed: int, pad: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.rows, self.cols, self.m, self.block, self.pad = rows, cols, m, block, pad
        self.grid = BlockGrid(rows, cols, block)
        self.mask = torch.rand(self.grid.shape, generator=self.random) < density
        self.index = new_index(self.grid)
        write_index(self.index, self.grid, self.mask)
        self.elements = self.grid.expand(self.mask)

    def randn(self, rows: int, cols: int, dtype: torch.dtype, pad: int = 0) -> Tensor:
        return torch.randn(rows, cols + pad, generator=self.random).to(dtype)[:, :cols]

    def canvas(self, rows: int, cols: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A buffer of sentinels and the view of it that a kernel writes."""
        buffer = torch.full((rows, cols + self.pad), 7.0, dtype=dtype)
        return buffer, buffer[:, :cols]


TOKENS = st.one_of(st.sampled_from([0, 1, 2, 16, 17, 48, 96, 128, 256]), st.integers(1, 300))


@st.composite
def cases(draw: st.DrawFn, blocks: Sequence[int] = table.BLOCKS, tokens: st.SearchStrategy[int] = TOKENS) -> Case:
    block = draw(st.sampled_from(blocks))
    side = st.integers(1, max(70, 3 * block + 1))
    return Case(
        rows=draw(side),
        cols=draw(side),
        m=draw(tokens),
        block=block,
        density=draw(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])),
        seed=draw(st.integers(0, 2**31)),
        pad=draw(st.sampled_from([0, 1, 5])),
    )


def assert_summed(got: Tensor, exact: Exact, terms: int, dtype: torch.dtype) -> None:
    """A float32 sum of ``terms`` products, rounded to ``dtype``."""
    assert got.dtype == dtype
    assert_within(got, exact.value, of_sum(terms) * exact.magnitude + of_rounding(dtype) * exact.value.abs())


def check_spmm(lib: Library, case: Case, dtypes: tuple[torch.dtype, torch.dtype], by_rows: bool, bias_dtype) -> Tensor:
    outputs, reduction = (case.rows, case.cols) if by_rows else (case.cols, case.rows)
    x = case.randn(case.m, reduction, dtypes[0], case.pad)
    w = case.randn(case.rows, case.cols, dtypes[1])
    bias = None if bias_dtype is None else case.randn(1, outputs, bias_dtype)[0]
    buffer, out = case.canvas(case.m, outputs, dtypes[0])
    lib.spmm(x, w, bias, case.index, case.block, by_rows, out)

    weight = w.to(dtypes[0]) * case.elements
    assert_summed(out, product(x, weight.t() if by_rows else weight, bias), reduction + 1, dtypes[0])
    assert (buffer[:, outputs:] == 7).all()
    return out


def check_packed(lib: Library, case: Case, dtype: torch.dtype, bias_dtype: torch.dtype | None) -> Tensor:
    """Of a weight [outputs, inputs] whose values outside the active blocks, and beside the weight, are NaN."""
    w = torch.where(case.elements, case.randn(case.rows, case.cols, dtype), torch.nan)
    values, index = pack(w, case.grid, case.mask)
    x = case.randn(case.m, case.cols, dtype, case.pad)
    bias = None if bias_dtype is None else case.randn(1, case.rows, bias_dtype)[0]
    buffer, out = case.canvas(case.m, case.rows, dtype)
    lib.packed(x, values, index, bias, case.block, out)
    assert_summed(out, product(x, torch.where(case.elements, w, 0).t(), bias), case.cols + 1, dtype)
    assert (buffer[:, case.rows :] == 7).all()
    return out


def check_grad_weight(
    lib: Library, case: Case, in_dtype: torch.dtype, out_dtype: torch.dtype, colsum_of: str
) -> Tensor:
    a = case.randn(case.m, case.rows, in_dtype, case.pad)
    b = case.randn(case.m, case.cols, in_dtype, 2 * case.pad)
    buffer, out = case.canvas(case.rows, case.cols, out_dtype)
    summed = {"a": a, "b": b, "": None}[colsum_of]
    colsum = None if summed is None else torch.full((summed.shape[1],), 7.0)
    lib.grad_weight(a, b, case.index, case.block, out, colsum, colsum_of == "a")

    exact = product(a.t(), b)
    assert_summed(out, Exact(exact.value * case.elements, exact.magnitude), case.m, out_dtype)
    assert (out[~case.elements] == 0).all()
    assert (buffer[:, case.cols :] == 7).all()
    if summed is not None:
        assert_summed(colsum, total(summed), case.m, F32)
    return out
