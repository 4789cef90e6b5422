"""Zeroing inactive blocks on a GPU: the kernel in Triton's interpreter against ``torch.where``, its machine code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched_by_hand import interpreted
from mask_cases import block_masks, expand, index_of
from mst_compile.kernels.triton import tables, zero
from mst_compile.lowering import cuda
from oracles import assert_same_bits
from pretend_gpu import cross_compile_jit
from pretend_gpu.machine.facts import LOADED

from mst_compile.blocks.grid import BlockGrid


@pytest.fixture(scope="module", autouse=True)
def in_the_interpreter() -> Iterator[None]:
    with interpreted(zero, "zero_inactive"):
        yield


KERNEL = zero.zero_inactive  # as it is, for the compiler
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


@settings(max_examples=40)
@given(st.data())
def test_any_number_of_tensors_in_one_call(data: st.DataObject) -> None:
    tensors, indexes, grids, expected, around = [], [], [], [], []
    for _ in range(data.draw(st.integers(1, 4))):
        rows, cols = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 300))
        block, dtype = data.draw(st.sampled_from([32, 64, 128])), data.draw(st.sampled_from(DTYPES))
        grid = BlockGrid(rows, cols, block)
        mask = data.draw(block_masks(*grid.shape))
        wide = torch.randint(1, 100, (rows, cols + data.draw(st.sampled_from([0, 1, 16])))).to(dtype)
        tensor = wide[:, :cols]
        if dtype.is_floating_point:
            tensor[-1, -1] = torch.nan
        tensors.append(tensor)
        indexes.append(index_of(mask, rows, cols, block))
        grids.append(grid)
        expected.append(torch.where(expand(mask, rows, cols, block), tensor, torch.zeros((), dtype=dtype)))
        around.append((wide[:, cols:], wide[:, cols:].clone()))
    zero.zero_inactive_(tensors, indexes, grids)
    for tensor, right in zip(tensors, expected, strict=True):
        assert_same_bits(tensor, right)
    assert all(torch.equal(now, before) for now, before in around)


def test_a_table_serves_until_something_moves() -> None:
    grid = BlockGrid(64, 96, 32)
    index = index_of(torch.eye(2, 3, dtype=torch.bool), 64, 96, 32)
    zero._launch.cache_clear()
    tables.rows_of.cache_clear()
    tables.programs_of.cache_clear()
    tensor = torch.ones(64, 96)
    zero.zero_inactive_([tensor], [index], [grid])
    assert tables.rows_of.cache_info().misses == 1
    index.copy_(index_of(torch.ones(2, 3, dtype=torch.bool), 64, 96, 32))  # an event writes into the same index
    tensor.fill_(2)
    zero.zero_inactive_([tensor], [index], [grid])
    assert (tensor == 2).all()
    assert tables.rows_of.cache_info().misses == 1
    other = torch.ones(64, 96)
    zero.zero_inactive_([other], [index], [grid])
    assert tables.rows_of.cache_info().misses == 2
    assert tables.programs_of.cache_info().misses == 1  # which do not go by addresses


def test_nothing_to_do() -> None:
    zero.zero_inactive_([torch.ones(0, 40)], [torch.zeros(8, dtype=torch.int32)], [BlockGrid(0, 40, 32)])
    zero.zero_inactive_([], [], [])


@pytest.mark.parametrize(("size", "type_"), [(1, "i8"), (2, "i16"), (4, "i32"), (8, "i64")])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_stores_are_16_bytes_wide(size: int, type_: str, block: int) -> None:
    element = zero._INTEGERS[size]
    assert str(element).endswith(type_[1:])
    constants = {"ELEMENT": element, "BLOCK": block, "WIDTH": zero.width_of(block), "ALIGNED": 16 // size}
    facts = cross_compile_jit(KERNEL, {"table": "*i64", "programs": "*i32"}, constants)
    assert facts.spills == 0
    assert set(facts.writes[LOADED]) == {16}


@pytest.mark.parametrize(
    ("address", "cols", "stride", "aligned"),
    [(4096, 64, 768, 4), (4100, 64, 768, 1), (4096, 64, 770, 1), (4096, 66, 768, 1)],
)
def test_alignment(address: int, cols: int, stride: int, aligned: int) -> None:
    good = zero.Place(8192, 0, 64, 64, 768, 2)
    assert zero.alignment([good], 4) == 4
    assert zero.alignment([good, zero.Place(address, 0, 64, cols, stride, 2)], 4) == aligned


def test_the_record_takes_what_the_kernel_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_why_no_kernels", lambda: None)
    monkeypatch.setattr(cuda, "_c_compiler", lambda: "gcc")
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    takes, grid = cuda._Bulk().takes, BlockGrid(64, 96, 32)
    assert takes(torch.ones(64, 96), grid)
    assert not takes(torch.ones(96, 64).t(), grid)
    assert not takes(torch.ones(64, 96, dtype=torch.complex128), grid)
    assert not takes(torch.ones(64, 96), BlockGrid(64, 96, 8))
    capturing = True
    assert not takes(torch.ones(64, 96), grid)
    capturing = False
    monkeypatch.setattr(cuda, "_c_compiler", lambda: None)
    assert takes(torch.ones(64, 96), grid)  # what has launched needs no compiler any more
    other = cuda._Bulk()
    assert not other.takes(torch.ones(64, 96), grid)
    monkeypatch.setattr(cuda, "_c_compiler", lambda: "gcc")
    assert other.takes(torch.ones(64, 96), grid)
