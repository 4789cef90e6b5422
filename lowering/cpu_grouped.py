"""``mst::grouped_linear`` and its gradients on the CPU: for each group the product of one matrix.

Each reads its rows of ``x``, its matrix and its index where they lie, and writes its rows of the result: nothing is
copied. With ``choose`` each group runs what is faster for as many tokens as it has, ours or the library's product. Ours
are one call of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor

from mst_compile.blocks.index import DENSE_GRAD, NNZ
from mst_compile.ops.grouped import groups

from . import cpu_choice, cpu_dense, cpu_linear, cpu_times


def linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float = 0.0,
    choose: bool = False,
) -> Tensor | None:
    """``mst::grouped_linear``; None where there is no kernel. The weight is read as it is, where it is not 0."""
    if not cpu_linear.supported(block, x, weight.dtype, weight, offsets, index):
        return None
    out = x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))
    linear_out(x, weight, offsets, index, block=block, transposed=transposed, choose=choose, out=out)
    return out


def grad_input(
    grad: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float = 0.0,
    choose: bool = False,
) -> Tensor | None:
    """``mst::grouped_linear_grad_input``; None where there is no kernel."""
    return linear(grad, weight, offsets, index, block, not transposed, density, choose)


def grad_weight(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    dtype: torch.dtype,
    density: float = 0.0,
    choose: bool = False,
) -> Tensor | None:
    """``mst::grouped_linear_grad_weight``; None where there is no kernel, and for a gradient on all blocks."""
    if not cpu_linear.supported(block, grad, dtype, x, offsets, index) or grad.dtype != x.dtype:
        return None
    if index[:, DENSE_GRAD].any():
        return None
    gy, x2, index = cpu_linear.rows_of(grad), cpu_linear.rows_of(x), index.contiguous()
    a, b = (x2, gy) if transposed else (gy, x2)
    out = torch.empty((len(index), a.shape[1], b.shape[1]), dtype=dtype, device="cpu")
    bounds = groups(offsets, len(a))
    dense = _dense_ones(cpu_times.GRAD_WEIGHT, out, a, bounds, index, block) if choose else set()
    for e in dense:
        start, end = bounds[e]
        cpu_dense.grad_weight(a[start:end], b[start:end], index[e], block, out[e], None, False)
    ours = [(e, start, end) for e, (start, end) in enumerate(bounds) if e not in dense]
    kernels.grad_weight_groups(a, b, index, ours, block, out)
    return out


def linear_out(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor,
    *,
    block: int,
    transposed: bool,
    choose: bool = False,
    out: Tensor,
) -> Tensor:
    """Write the products of all groups to ``out`` ``[S, ...]``, and 0 to the rows of none. Grad-input is the same
    product with the other orientation of the weight."""
    rows, weight, index = cpu_linear.rows_of(x), weight.contiguous(), index.contiguous()
    kind, bounds = cpu_times.COLS if transposed else cpu_times.ROWS, groups(offsets, len(rows))
    dense = _dense_ones(kind, weight, rows, bounds, index, block) if choose else set()
    for e in dense:
        start, end = bounds[e]
        cpu_dense.linear(rows[start:end], weight[e], None, not transposed, out[start:end])
    ours = [(e, start, end) for e, (start, end) in enumerate(bounds) if start < end and e not in dense]
    kernels.spmm_groups(rows, weight, index, ours, block, not transposed, out)
    out[bounds[-1][1] if bounds else 0 :].zero_()
    return out


def _dense_ones(
    kind: str, stack: Tensor, x: Tensor, bounds: Sequence[tuple[int, int]], index: Tensor, block: int
) -> set[int]:
    """The matrices whose dense product is the faster one; ``stack`` holds them, or their gradients."""
    _, rows, cols = stack.shape
    if not rows or not cols or not x.shape[1]:
        return set()
    threads, active = torch.get_num_threads(), index[:, NNZ].tolist()
    found = set()
    for e, (start, end) in enumerate(bounds):
        if start < end:
            product = cpu_linear.product_of(kind, rows, cols, block, end - start, x.dtype, stack.dtype, False, threads)
            if cpu_choice.is_dense_faster(product, active[e]):
                found.add(e)
    return found
