"""How long products with the matrices of a stack take, ours and the dense model's: a few groups of them, as one call.

Groups are shared out among the threads, by the library's grouped product as by our kernels, so that many of few tokens
take another time than as many products one after the other (:mod:`.cpu_times`): on two threads, of 64 groups of 64
tokens with 1024 x 512 weights in bfloat16, dense, a quarter of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid

from . import cpu_times, tuning
from .cpu_times import DENSITIES, GRAD_WEIGHT, ROWS, Product
from .device import BATCH, COPIES, LOOP, Times

_MOST_GROUPS = 16
_MOST_WEIGHTS = 8 << 20  # in all groups together
_TICK = 1e-9


class Groups(NamedTuple):
    """Products with several matrices of a stack.

    Attributes:
        product: with one of them.
        groups: how many there are. dense: how the dense model multiplies them, see :class:`.device.Layer`.
    """

    product: Product
    groups: int
    dense: str


def asked(product: Product, groups: int, dense: str) -> Groups:
    """What is measured for that many groups: fewer stand for them."""
    fit = _MOST_WEIGHTS // max(1, product.rows * product.cols)
    return Groups(product, max(2, min(groups, _MOST_GROUPS, fit)), dense)


def measure(asked: Groups) -> Times:
    """Seconds of one group; takes about a tenth of one. Leaves random states, modes and gradients alone."""
    rows, cols = cpu_times.part_of(asked.product)
    grid = BlockGrid(rows, cols, asked.product.block)
    with cpu_times.undisturbed():
        tokens = cpu_times.tokens_of(asked.product, grid)
        seconds = cpu_times.interleaved_sides(_sides(asked, grid, tokens))
    dense, low, high = (min(times) / asked.groups for times in seconds)
    dense *= tokens if asked.dense == COPIES else 1  # measured with one token for each matrix
    slope = max((high - low) / (DENSITIES[1] - DENSITIES[0]), _TICK)
    fixed = max(low - slope * DENSITIES[0], _TICK)
    whole = (asked.product.rows * asked.product.cols) / (rows * cols) * asked.product.tokens / tokens
    return Times(dense * whole, fixed * whole, slope * whole)


def _sides(asked: Groups, grid: BlockGrid, tokens: int) -> list[Callable[[], object]]:
    """The dense products, and ours at each of the densities."""
    product, count = asked.product, asked.groups
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = product.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    one = [tuning.realistic_index(grid, density, "cpu") for density in DENSITIES]
    indices = [index.expand(count, -1).contiguous() for index in one]
    groups = [(i, i * tokens, (i + 1) * tokens) for i in range(count)]
    if product.kind == GRAD_WEIGHT:
        a, b = random(count * tokens, grid.rows), random(count * tokens, grid.cols)
        stack = torch.empty(count, grid.rows, grid.cols, dtype=product.weight_dtype, device="cpu")
        dense = _dense_gradients(asked.dense, a, b, count, stack)
        return [
            dense,
            *(lambda i=i: kernels.grad_weight_groups(a, b, i, groups, product.block, stack) for i in indices),
        ]
    by_rows = product.kind == ROWS
    outputs, reduced = (grid.rows, grid.cols) if by_rows else (grid.cols, grid.rows)
    x, stack = random(count * tokens, reduced), random(count, grid.rows, grid.cols, dtype=product.weight_dtype)
    y = torch.empty(count * tokens, outputs, dtype=product.dtype, device="cpu")
    dense = _dense_products(asked.dense, x, (stack.mT if by_rows else stack).to(x.dtype), y)
    return [
        dense,
        *(lambda i=i: kernels.spmm_groups(x, stack, i, groups, product.block, by_rows, y) for i in indices),
    ]


def _dense_products(how: str, x: Tensor, stack: Tensor, y: Tensor) -> Callable[[], object]:
    """``x``, of as many rows for each matrix, times a stack ``[groups, in, out]``."""
    count = len(stack)
    if how == COPIES:
        every = torch.arange(count, device="cpu")
        return lambda: torch.bmm(x[:count, None], stack[every])
    if how == LOOP:
        return lambda: [torch.mm(p, w, out=o) for p, w, o in zip(x.chunk(count), stack, y.chunk(count), strict=True)]
    if how == BATCH:
        return lambda: torch.bmm(x.view(count, -1, x.shape[1]), stack)
    ends = _ends(count, len(x))
    return lambda: torch._grouped_mm(x, stack, offs=ends)


def _dense_gradients(how: str, a: Tensor, b: Tensor, count: int, stack: Tensor) -> Callable[[], object]:
    """The gradients of the matrices, of the rows of ``a`` and ``b`` that are theirs, to ``stack`` where a program holds
    one."""
    if how == COPIES:
        every = torch.arange(count, device="cpu")
        stack.zero_()
        return lambda: stack.index_put_((every,), torch.bmm(a[:count, :, None], b[:count, None]).to(stack), True)
    if how == LOOP and stack.dtype == a.dtype:
        parts = list(zip(a.chunk(count), b.chunk(count), stack, strict=True))
        return lambda: [torch.mm(p.t(), q, out=o) for p, q, o in parts]
    if how in (BATCH, LOOP):
        return lambda: torch.bmm(a.view(count, -1, a.shape[1]).mT, b.view(count, -1, b.shape[1]))
    ends = _ends(count, len(a))
    return lambda: torch._grouped_mm(a.t(), b, offs=ends)


def _ends(count: int, rows: int) -> Tensor:
    """Where the rows of each group end."""
    return torch.arange(1, count + 1, dtype=torch.int32, device="cpu") * (rows // count)
