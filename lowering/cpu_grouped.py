"""``mst::grouped_linear`` and its gradients on the CPU: for each group the product of one matrix.

Each reads its rows of ``x``, its matrix and its index where they lie, and writes its rows of the result: nothing is
copied. With ``choose`` each group runs what is faster for as many tokens as it has, ours or the library's product.
"""

from __future__ import annotations

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor

from mst_compile.blocks.index import DENSE_GRAD
from mst_compile.ops.grouped import groups

from . import cpu_linear


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
    indices = index.unbind()
    if any(kernels.number_at(own, DENSE_GRAD) for own in indices):
        return None
    gy, x2 = cpu_linear.rows_of(grad), cpu_linear.rows_of(x)
    shape = (x2.shape[1], gy.shape[1]) if transposed else (gy.shape[1], x2.shape[1])
    out = torch.empty((len(indices), *shape), dtype=dtype, device="cpu")
    for own, matrix, (start, end) in zip(indices, out.unbind(), groups(offsets, x2.shape[0]), strict=True):
        if start < end:
            cpu_linear.grad_weight_out(gy[start:end], x2[start:end], own, block, transposed, choose, matrix, None)
        else:
            matrix.zero_()
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
    rows, bounds = cpu_linear.rows_of(x), groups(offsets, x.shape[0])
    for matrix, own, (start, end) in zip(weight.unbind(), index.unbind(), bounds, strict=True):
        if start < end:
            cpu_linear.linear_out(
                rows[start:end], matrix, own, block=block, transposed=transposed, choose=choose, out=out[start:end]
            )
    out[bounds[-1][1] if bounds else 0 :].zero_()
    return out
