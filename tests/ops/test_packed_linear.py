"""``mst::packed_linear`` and the layout that it takes, against a masked dense product in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mask_cases import block_masks, expand
from mst_compile.lowering import cpu_packed
from oracles import assert_within, of_rounding, of_sum, product
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.packed import LARGEST_BLOCK, pack, packed_mask, unpack, why_no_packed
from mst_compile.ops.packed import VERSION, packed_linear_reference

packed_linear = torch.ops.mst.packed_linear
F16, F32, BF16, F64 = torch.float16, torch.float32, torch.bfloat16, torch.float64
BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)
LAYOUTS = ("contiguous", "transposed", "every other", "rows of wider", "expanded")


class Case(NamedTuple):
    """One product. ``dense`` is what the packed weight stands for; ``weight`` holds NaN where that is inactive."""

    x: Tensor
    weight: Tensor
    dense: Tensor
    bias: Tensor | None
    grid: BlockGrid
    mask: Tensor


def laid_out(t: Tensor, how: str) -> Tensor:
    """The same values in another layout; of ``expanded`` those of the first row."""
    if how == "transposed" and t.dim() >= 2:
        return t.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    if how == "expanded" and t.dim() >= 2 and t.shape[-2]:
        return t[..., :1, :].expand(t.shape)
    if how in ("every other", "rows of wider"):
        step, more = (2, 0) if how == "every other" else (1, 3)
        wide = torch.full((*t.shape[:-1], step * t.shape[-1] + more), torch.nan, dtype=t.dtype)
        wide[..., : step * t.shape[-1] : step] = t
        return wide[..., : step * t.shape[-1] : step]
    return t


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block = draw(st.sampled_from(BLOCKS))
    rows, cols = draw(st.integers(1, max(60, block + 9))), draw(st.integers(1, max(60, block + 9)))
    lead = draw(st.sampled_from([(), (1,), (2,), (7,), (33,), (3, 5), (1, 1), (0,), (2, 0), (2, 3, 4)]))
    x_dtype = draw(st.sampled_from([F32, BF16, F64, F16]))
    w_dtype = draw(st.sampled_from([x_dtype, x_dtype, F32]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grid = BlockGrid(rows, cols, block)
    mask = draw(block_masks(*grid.shape))
    keep = expand(mask, rows, cols, block)
    weight = torch.where(keep, torch.randn(rows, cols, generator=gen), torch.nan).to(w_dtype)
    bias_dtype = draw(st.sampled_from([None, x_dtype, w_dtype]))
    bias = None if bias_dtype is None else torch.randn(rows, generator=gen).to(bias_dtype)
    x = laid_out(torch.randn(*lead, cols, generator=gen).to(x_dtype), draw(st.sampled_from(LAYOUTS)))
    return Case(x, weight, torch.where(keep, weight, 0), bias, grid, mask)


def check(case: Case, got: Tensor) -> None:
    dtype = case.x.dtype
    assert got.dtype == dtype
    assert got.shape == (*case.x.shape[:-1], case.grid.rows)
    exact = product(case.x, case.dense.to(dtype).t(), case.bias)
    error = of_sum(case.grid.cols + 1, dtype=F64 if dtype == F64 else F32) + of_rounding(dtype, times=2)
    assert_within(got, exact.value, error * exact.magnitude)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_operator_and_its_reference(case: Case) -> None:
    """Any dtype, block, mask and layout, weights of another dtype than the input, no tokens."""
    values, index = pack(case.weight, case.grid, case.mask)
    given_ = case.x, values, index, case.bias, case.grid.rows, case.grid.block, VERSION
    check(case, packed_linear(*given_))
    check(case, packed_linear_reference(*given_))
    meta = packed_linear(*(t.to("meta") if isinstance(t, Tensor) else t for t in given_))
    assert (meta.shape, meta.dtype, meta.device.type) == ((*case.x.shape[:-1], case.grid.rows), case.x.dtype, "meta")


@settings(max_examples=100, deadline=None)
@given(cases())
def test_what_compiled_code_calls(case: Case) -> None:
    """Any weight's and bias's dtype, on rows as its lowering lays them out."""
    bias = () if case.bias is None else (case.bias,)
    assume(cpu_packed.why_not(case.x.dtype, case.grid.block, bias[0].dtype if bias else None) is None)
    values, index = pack(case.weight, case.grid, case.mask)
    x = case.x.reshape(-1, case.grid.cols).contiguous()
    out = torch.full((x.shape[0], case.grid.rows), torch.nan, dtype=x.dtype)
    assert cpu_packed.packed_linear_out(x, values, index, *bias, block=case.grid.block, out=out) is out
    check(case._replace(x=x), out)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_packing_keeps_the_active_blocks_alone(case: Case) -> None:
    values, index = pack(case.weight, case.grid, case.mask)
    active = int(case.mask.sum())
    assert values.shape == (active * case.grid.block**2,)
    assert index.shape == (case.grid.block_rows + 1 + active,)
    assert why_no_packed(values, index, case.grid) is None
    assert torch.equal(packed_mask(index, case.grid), case.mask)
    assert torch.equal(unpack(values, index, case.grid), case.dense)
    other = unpack(values.to(BF16), index, case.grid)
    assert torch.equal(other, case.dense.to(BF16)), "a cast of the values is a cast of the weight"


def test_a_weight_lies_in_the_order_in_which_it_is_read() -> None:
    """Strips of 8 rows, in each all active blocks, in each pairs of columns, in each the rows."""
    grid = BlockGrid(16, 48, 16)
    weight = torch.arange(16 * 48.0).view(16, 48)
    values, index = pack(weight, grid, torch.tensor([[True, False, True]]))
    assert index.tolist() == [0, 2, 0, 2]
    want = [
        weight[strip * 8 + row, block * 16 + 2 * pair + one].item()
        for strip in range(2) for block in (0, 2) for pair in range(8) for row in range(8) for one in range(2)
    ]  # fmt: skip
    assert values.tolist() == want


def test_the_kernel_runs_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(BLOCKS) == LARGEST_BLOCK
    if cpu_packed.why_not(F32, 8, None) is not None:
        pytest.skip("no CPU kernels")
    seen: list[tuple[torch.dtype, int]] = []
    run = cpu_packed._run
    monkeypatch.setattr(cpu_packed, "_run", lambda x, *a: (seen.append((x.dtype, a[3])), run(x, *a)))
    for dtype, block in [(F32, 8), (BF16, 128), (F64, 8), (F16, 8)]:
        grid = BlockGrid(20, 30, block)
        values, index = pack(torch.randn(20, 30, dtype=dtype), grid, torch.ones(grid.shape, dtype=torch.bool))
        packed_linear(torch.randn(2, 30, dtype=dtype), values, index, None, 20, block, VERSION)
    assert seen == [(F32, 8), (BF16, 128)]


def test_compiled_code_of_a_cache_runs_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's cache may come from a process that had some; an error of a kernel that is there stays one."""
    grid = BlockGrid(24, 32, 8)
    weight, mask = torch.randn(24, 32), torch.rand(grid.shape) < 0.5
    values, index = pack(weight, grid, mask)
    x, bias = torch.randn(5, 32), torch.randn(24)

    def unavailable(*args: object) -> None:
        raise RuntimeError("the CPU kernels are not available")

    monkeypatch.setattr(cpu_packed.kernels, "packed_as_laid_out", unavailable)
    for available in (False, True):
        monkeypatch.setattr(cpu_packed.kernels, "available", lambda available=available: available)
        out = torch.full((5, 24), torch.nan)
        if available:
            with pytest.raises(RuntimeError, match="not available"):
                cpu_packed.packed_linear_out(x, values, index, bias, block=8, out=out)
        else:
            cpu_packed.packed_linear_out(x, values, index, bias, block=8, out=out)
            assert torch.equal(out, packed_linear_reference(x, values, index, bias, 24, 8, VERSION))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_opcheck(dtype: torch.dtype) -> None:
    grid = BlockGrid(20, 30, 8)
    values, index = pack(torch.randn(20, 30, dtype=dtype), grid, torch.rand(grid.shape) < 0.5)
    for x in (torch.randn(3, 30, dtype=dtype), torch.randn(2, 3, 30, dtype=dtype), torch.randn(30, dtype=dtype)):
        for bias in (None, torch.randn(20, dtype=dtype)):
            torch.library.opcheck(packed_linear.default, (x, values, index, bias, 20, 8, VERSION))


def test_what_is_no_packed_weight_is_named() -> None:
    grid = BlockGrid(20, 30, 8)  # 3 x 4 blocks
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    values, index = pack(torch.randn(20, 30), grid, mask)
    assert index.tolist() == [0, 2, 2, 5, 0, 2, 1, 2, 3]

    def said(place: int, word: int) -> str:
        other = index.clone()
        other[place] = word
        return why_no_packed(values, other, grid) or "nothing"

    assert "do not hold" in said(0, 1)
    assert "do not hold" in said(1, 3)
    assert "do not hold" in said(3, 4)
    assert "columns 0 to 4 of 4" in said(8, 4)
    assert "columns -1 to 3" in said(4, -1)
    assert "do not ascend" in said(5, 0)
    assert "do not ascend" in said(7, 3)
    assert said(1, 1) == "nothing", "a row less and one more"
    assert "not values of shape" in (why_no_packed(values[1:], index, grid) or "")
    assert "int32" in (why_no_packed(values, index.long(), grid) or "")
    assert "int32" in (why_no_packed(values, index[:3], grid) or "")
