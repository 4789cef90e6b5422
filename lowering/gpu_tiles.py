"""Which tiles of a product are offered to Inductor, and whether the dense product is.

With ``mode="max-autotune"`` (or Inductor's ``max_autotune_gemm``) all that can run are, and the fastest is taken.
Otherwise there is nothing to wait for: one choice, from :mod:`mst_compile.kernels.triton.table`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from mst_compile.kernels.triton import splits, table
from mst_compile.kernels.triton.tiles import (
    GEMM,
    GRAD_WEIGHT,
    GROUPED_GEMM,
    GROUPED_GRAD_WEIGHT,
    GemmTile,
    GradWeightTile,
)
from torch._inductor import config

from mst_compile.blocks.grid import BlockGrid

from . import compat

_TMA_CAPABILITY = (9, 0)


def tunes() -> bool:
    """Whether products are autotuned, by Inductor's settings of the moment."""
    return bool(config.max_autotune or config.max_autotune_gemm)


def kind(dtype: torch.dtype) -> str:
    """Precision of a product as in tiles.py: "half", "tf32" or "ieee"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if compat.tf32_allowed() else "ieee"


def precision(dtype: torch.dtype) -> str:
    """The same as a template's constant."""
    return "'tf32'" if kind(dtype) != "ieee" else "'ieee'"


def gemm(a: Any, grid: BlockGrid, by_rows: bool, density: float) -> tuple[list[GemmTile], bool]:
    """Tiles of forward (``by_rows`` as in :func:`.gpu.linear`) or grad-input, and whether the dense product is offered.

    Args:
        a: the activations or their gradients, ``[..., features]``.
        density: that training will mostly run at.
    """
    dtype = a.get_dtype()
    if tunes():
        tiles = GEMM[grid.block, kind(dtype)]
        return _runnable([t for t in tiles if _has_tma(a) or not t.tma], grid.block, a), True
    tokens, processors = math.prod(map(compat.hint, a.get_size()[:-1])), _properties(a).multi_processor_count
    tile = table.gemm(grid, by_rows, kind(dtype), density, tokens, processors, _has_tma(a))
    return _one(tile, grid.block, a)


def grad_weight(x: Any, grid: BlockGrid, density: float) -> tuple[list[GradWeightTile], bool]:
    """Tiles of grad-weight, and whether the dense product is offered; ``x`` as in :func:`gemm`."""
    dtype = x.get_dtype()
    if tunes():
        return _runnable(GRAD_WEIGHT[grid.block, kind(dtype)], grid.block, x), True
    return _one(table.grad_weight(grid, kind(dtype), density), grid.block, x)


def grouped_gemm(a: Any, grid: BlockGrid, matrices: int, by_rows: bool, density: float) -> list[GemmTile]:
    """Tiles of forward or grad-input of a stack of matrices with this grid each; there is no dense product to offer:
    the library's leaves rows of no group as they come out of the allocator, and takes bfloat16 alone."""
    tiles = _runnable(GROUPED_GEMM[grid.block, kind(a.get_dtype())], grid.block, a)
    if tunes() or not tiles:
        return tiles
    tokens, lines = compat.hint(a.get_size()[0]), grid.lines(by_rows).count
    asked = kind(a.get_dtype()), density, tokens, matrices, _properties(a).multi_processor_count
    return [table.grouped_gemm(tiles, grid, lines, *asked)]


def grouped_grad_weight(x: Any, grid: BlockGrid, density: float) -> list[GradWeightTile]:
    """Tiles of grad-weight of a stack of matrices with this grid each."""
    own = kind(x.get_dtype())
    tiles = _runnable(GROUPED_GRAD_WEIGHT[grid.block, own], grid.block, x)
    return tiles if tunes() or not tiles else [table.grouped_grad_weight(tiles, grid.block, own, density)]


def parts(x: Any, grid: BlockGrid, out_first: bool, tile: GradWeightTile, density: float) -> int:
    """How many parts grad-weight cuts the tokens of ``x``, ``[tokens, features]``, into; ``out_first``: the weight is
    stored ``[out, in]``."""
    properties = _properties(x)
    fitting = min(
        properties.shared_memory_per_multiprocessor // tile.shared(grid.block, x.get_dtype().itemsize),
        properties.regs_per_multiprocessor // (32 * tile.warps * tile.registers(grid.block)),
    )
    programs = grid.blocks * density / tile.gather + grid.lines(out_first).count * (tile.gather - 1) / (2 * tile.gather)
    at_once = properties.multi_processor_count * max(1, fitting)
    return splits.parts(compat.hint(x.get_size()[0]), max(1, round(programs)), at_once, 4 * grid.rows * grid.cols)


def _one(tile: Any, block: int, x: Any) -> tuple[list[Any], bool]:
    tiles = [] if tile is None else _runnable([tile], block, x)
    return tiles, not tiles


def _runnable(tiles: list[Any], block: int, x: Any) -> list[Any]:
    """The tiles that fit this GPU's shared memory."""
    room = _properties(x).shared_memory_per_block_optin
    return [t for t in tiles if t.shared(block, x.get_dtype().itemsize) <= room]


def _has_tma(x: Any) -> bool:
    """Whether this GPU loads by descriptor. Those want rows at multiples of 16 bytes; gpu_operands.py sees to it."""
    properties = _properties(x)
    return (properties.major, properties.minor) >= _TMA_CAPABILITY


def _properties(operand: Any) -> Any:
    return torch.cuda.get_device_properties(operand.get_device())
