"""What is in each block, on a GPU: the kernel in Triton's interpreter against its own order of sums written in PyTorch,
bit for bit, and against float64; its machine code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched_by_hand import interpreted
from mst_compile.kernels.triton import measure
from oracles import assert_same_bits, assert_within, of_sum, smallest
from pretend_gpu import cross_compile_jit
from pretend_gpu.machine.facts import LOADED
from sum_cases import KINDS, measured

from mst_compile.blocks.grid import BlockGrid

KERNEL = measure.measure_blocks  # as it is, for the compiler


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter() -> Iterator[None]:
    with interpreted(measure, "measure_blocks"):
        yield


@settings(max_examples=12)
@given(st.data())
def test_any_number_of_tensors_in_one_call(data: st.DataObject) -> None:
    tensors, grids, expected = [], [], []
    kind = data.draw(st.sampled_from(KINDS))
    for _ in range(data.draw(st.integers(1, 4))):
        rows, cols = data.draw(st.integers(1, 150)), data.draw(st.integers(0, 300))
        block, dtype = data.draw(st.sampled_from([32, 64, 128])), data.draw(st.sampled_from(measure.DTYPES))
        wide = torch.randn(rows, cols + data.draw(st.sampled_from([0, 1, 16]))).to(dtype)
        wide[:, cols:] = torch.nan  # which nobody may read
        tensor = wide[:, :cols]
        tensor *= torch.rand(rows, cols) < data.draw(st.sampled_from([0.0, 0.001, 1.0]))
        if tensor.numel() and data.draw(st.booleans()):
            tensor[-1, -1] = data.draw(
                st.sampled_from([torch.nan, torch.inf, -0.0, torch.finfo(dtype).smallest_normal])
            )
        grid = BlockGrid(rows, cols, block)
        tensors.append(tensor)
        grids.append(grid)
        expected.append(measured(tensor, grid, kind).flatten())
    assert_same_bits(measure.measure(tensors, grids, kind), torch.cat(expected))


@pytest.mark.parametrize("dtype", measure.DTYPES)
def test_the_smallest_number_is_not_zero(dtype: torch.dtype) -> None:
    grid = BlockGrid(40, 70, 32)
    tensor = torch.zeros(40, 70, dtype=dtype)
    tensor[:, 0] = -0.0
    tensor[33, 69] = smallest(dtype)
    assert measure.measure([tensor], [grid], "nonzero").tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["squares", "magnitudes"])
@pytest.mark.parametrize("block", [32, 128])
def test_sums_are_those_of_float64(kind: str, block: int) -> None:
    grid = BlockGrid(200, 333, block)
    tensor = torch.randn(200, 333)
    elements = tensor.double().square() if kind == "squares" else tensor.double().abs()
    exact = torch.nn.functional.pad(elements, (0, grid.block_cols * block - 333, 0, grid.block_rows * block - 200))
    exact = exact.view(grid.block_rows, block, grid.block_cols, block).sum((1, 3))
    found = measure.measure([tensor], [grid], kind).view(grid.shape)
    assert_within(found, exact, of_sum(block * block) * exact)


def test_sums_do_not_depend_on_where_a_tensor_lies() -> None:
    """Ranks that hold the same values must come to the same bits, whatever their allocators did."""
    grid, values = BlockGrid(70, 96, 32), torch.randn(70, 96)
    held = torch.zeros(70, 128)
    found = []
    for shift in (0, 1, 2, 5):
        tensor = held[:, shift : shift + 96]
        tensor.copy_(values)
        found.append(measure.measure([tensor], [grid], "squares"))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize(
    ("kind", "dtype", "block"),
    [
        ("squares", torch.float32, 32),
        ("magnitudes", torch.bfloat16, 64),
        ("squares", torch.float64, 128),
        ("nonzero", torch.float32, 64),
        ("nonzero", torch.float16, 128),
    ],
)
def test_machine_code(kind: str, dtype: torch.dtype, block: int) -> None:
    """Loads of 16 bytes, several under way at once, no spills; and no product is fused into a sum."""
    constants = measure.constants(kind, dtype, block, 16 // dtype.itemsize)
    types = {"table": "*i64", "programs": "*i32", "out": "*fp32"}
    facts = cross_compile_jit(KERNEL, types, constants, **measure.OPTIONS)
    assert facts.spills == 0
    assert facts.reads[LOADED][16] >= 8
    assert "FFMA" not in facts.sass
