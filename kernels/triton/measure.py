"""What is in each block of weights and gradients, of any number of them in one launch: sums, or whether all is 0.

A topology event reads every weight twice and every gradient once. PyTorch takes two launches and a copy as large as the
tensor for the squares of one and their sums; here a program reads whole blocks of a block row once, 16 bytes a thread,
and stores a number for each: memory traffic is the tensor's bytes, arithmetic is two operations an element.

Sums are float32 in an order that is part of what is computed: down each column, row after row, then columns in pairs of
neighbours, pairs of pairs and so on, and no product is fused into an addition. Neither addresses nor alignment nor the
GPU enter the bits, so that ranks that hold the same values decide alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from mst_compile.kernels.triton import tables
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid

_ROW_BYTES = 2048  # of a program's rows: 16 a thread
_AT_ONCE = 8  # rows whose loads are under way together
_FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
_INTEGERS = {2: tl.int16, 4: tl.int32, 8: tl.int64}
DTYPES = tuple(_FLOATS)
_KINDS = {"squares": 0, "magnitudes": 1, "nonzero": 2}
OPTIONS: dict[str, int] = {"num_warps": 4, "enable_fp_fusion": False}  # of its compilation


@triton.jit
def measure_blocks(
    table, programs, out, KIND: tl.constexpr, ELEMENT: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    WIDTH: tl.constexpr, AT_ONCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program ``p`` measures, in tensor ``programs[p, 0]``, the blocks of block row ``programs[p, 1]`` among its
    columns from ``programs[p, 2] * WIDTH`` on.

    Args:
        table: int64 ``[tensors, 6]``: address of the elements, place of the first block in ``out``, rows, columns, row
            stride, block columns.
        programs: int32 ``[programs, 3]``.
        out: float32, a number for each block.
        KIND: 0 the sum of squares, 1 the sum of absolute values, 2 whether any element is not 0, as 1 or 0.
        ELEMENT: the elements' type; for ``KIND`` 2 an integer type as wide, as denormal numbers are not 0.
        BLOCK, LEVELS: edge of a block, and its logarithm to base 2.
        WIDTH: columns of a program, a multiple of ``BLOCK``.
        AT_ONCE: rows that are loaded together; divides ``BLOCK``.
        ALIGNED: into how many elements addresses, strides and columns can be divided.
    """
    program = tl.program_id(0)
    tensor = tl.load(programs + 3 * program)
    block_row = tl.load(programs + 3 * program + 1)
    first = tl.load(programs + 3 * program + 2) * WIDTH
    row = table + 6 * tensor
    elements = tl.load(row).to(tl.pointer_type(ELEMENT))
    place = tl.load(row + 1)
    height, width, stride, block_cols = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    elements = tl.multiple_of(elements, ALIGNED * (ELEMENT.primitive_bitwidth // 8))
    stride, width = tl.multiple_of(stride, ALIGNED), tl.multiple_of(width, ALIGNED)
    columns = first + tl.arange(0, WIDTH)
    inside = columns < width
    top = (block_row * BLOCK).to(tl.int64)
    found = tl.full([WIDTH], 0.0, tl.float32)
    for start in range(0, BLOCK, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            at = tl.full([WIDTH], start + i, tl.int64) + top
            x = tl.load(elements + at * stride + columns, mask=inside & (at < height), other=0)
            if KIND == 2:
                found = tl.maximum(found, ((x << 1) != 0).to(tl.float32))  # but for the sign
            else:
                value = x.to(tl.float32)
                found += value * value if KIND == 0 else tl.abs(value)
    for level in tl.static_range(LEVELS):
        left, right = tl.split(tl.reshape(found, [WIDTH >> (level + 1), 2]))
        found = tl.maximum(left, right) if KIND == 2 else left + right
    block = first // BLOCK + tl.arange(0, WIDTH >> LEVELS)
    tl.store(out + place + block_row * block_cols + block, found, mask=block < block_cols)


class Place(NamedTuple):
    """Where a tensor is, and where the numbers of its blocks go."""

    address: int
    first: int
    rows: int
    cols: int
    stride: int
    block_cols: int


def width_of(block: int, size: int) -> int:
    """Columns of a program, of elements of ``size`` bytes."""
    return max(_ROW_BYTES // size, block)


@functools.lru_cache(maxsize=1024)
def _launch(places: tuple[Place, ...], block: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Table, programs and alignment: found again at once, as long as nothing moves."""
    shapes = tuple((p.rows, p.cols) for p in places)
    aligned = tables.divides(size, [p.address for p in places], [n for p in places for n in (p.stride, p.cols)])
    return tables.rows_of(places, device), tables.programs_of(shapes, block, width_of(block, size), device), aligned


def constants(kind: str, dtype: torch.dtype, block: int, aligned: int) -> dict[str, object]:
    """Compile-time arguments of the kernel."""
    element = _INTEGERS[dtype.itemsize] if kind == "nonzero" else _FLOATS[dtype]
    levels, width = block.bit_length() - 1, width_of(block, dtype.itemsize)
    return {
        "KIND": _KINDS[kind], "ELEMENT": element, "BLOCK": block, "LEVELS": levels, "WIDTH": width,
        "AT_ONCE": _AT_ONCE, "ALIGNED": aligned,
    }  # fmt: skip


def measure(tensors: Sequence[Tensor], grids: Sequence[BlockGrid], kind: str) -> Tensor:
    """A number for each block of all the tensors: float32 ``[blocks]``, row by row, one tensor after the other.

    Args:
        tensors: ``[rows, cols]`` each, of one GPU and dtypes of :data:`DTYPES`, columns adjacent.
        grids: tiled ones.
        kind: ``"squares"`` or ``"magnitudes"``, which are added up, or ``"nonzero"``: 1 where any element is not 0.
    """
    groups: dict[tuple[int, torch.dtype], list[Place]] = {}
    first = 0
    for tensor, grid in zip(tensors, grids, strict=True):
        if tensor.numel():
            own = Place(tensor.data_ptr(), first, grid.rows, grid.cols, tensor.stride(0), grid.block_cols)
            groups.setdefault((grid.block, tensor.dtype), []).append(own)
        first += grid.blocks
    out = torch.empty(first, dtype=torch.float32, device=tensors[0].device)
    for (block, dtype), places in groups.items():
        with torch.cuda.device(out.device):
            table, programs, aligned = _launch(tuple(places), block, dtype.itemsize, out.device)
            measure_blocks[len(programs),](table, programs, out, **constants(kind, dtype, block, aligned), **OPTIONS)
    return out
