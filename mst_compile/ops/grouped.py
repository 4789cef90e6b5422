"""The operators ``mst::grouped_linear`` and its two gradients: schemas, eager reference, fakes, autograd.

A stack of E matrices, one an expert, is one weight ``[E, out, in]``, or ``[E, in, out]`` if ``transposed``. Rows of
``x`` ``[S, in]`` come sorted by matrix, and ``offsets`` (int32 or int64 ``[E]``) says where the rows of each end, as in
``torch.nn.functional.grouped_mm``: matrix ``e`` multiplies the rows from ``offsets[e - 1]`` (0 for the first) up to
``offsets[e]``. A matrix may have no rows; rows past the last offset belong to none, and their results are 0, where
PyTorch leaves them as they come out of the allocator. See :func:`groups` for offsets that do not ascend.

``index`` is int32 ``[E, L]``, contiguous: row ``e`` is the packed index of matrix ``e``
(:mod:`mst_compile.blocks.index`). ``block``, ``density`` and ``choose`` are as in :mod:`mst_compile.ops.linear`.

The reference below is plain PyTorch on the masked dense matrices. It is the oracle of all kernels, and what runs on a
device, dtype or block that has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_compile.blocks.index import DENSE_GRAD

from .library import define
from .linear import DENSITY, masked, side_by_side

_LINEAR = "mst::grouped_linear"
_GRAD_INPUT = "mst::grouped_linear_grad_input"
_GRAD_WEIGHT = "mst::grouped_linear_grad_weight"


def groups(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    """First row of each group and the row behind its last, of ``rows`` in all.

    An offset behind the last row ends its group there, and one below that before it leaves its group empty, so that
    no row belongs to two, and none is read that does not exist. Of a GPU's offsets the host waits for them.
    """
    found, start = [], 0
    for offset in offsets.tolist():
        end = max(start, min(offset, rows))
        found.append((start, end))
        start = end
    return found


def _masked(weight: Tensor, index: Tensor, block: int) -> Tensor:
    """``weight`` ``[E, ...]`` with everything outside the active blocks set to 0."""
    if not weight.shape[0]:
        return weight
    return torch.stack([masked(matrix, own, block) for matrix, own in zip(weight, index, strict=True)])


def _multiplied(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``x[rows of e] @ weight[e]`` for every ``e``, of ``weight`` ``[E, in, out]``, and 0 for rows of none."""
    bounds = groups(offsets, x.shape[0])
    last = bounds[-1][1] if bounds else 0
    products = [x[start:end] @ weight[e] for e, (start, end) in enumerate(bounds)]
    return torch.cat([*products, x.new_zeros(x.shape[0] - last, weight.shape[2])])


def grouped_linear_reference(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float = DENSITY,
    choose: bool = False,
) -> Tensor:
    """``y[s] = x[s] W_e`` on the active blocks of the matrix ``e`` of row ``s``, in ``x``'s dtype."""
    w = _masked(weight, index, block).to(x.dtype)
    return _multiplied(x.contiguous(), w if transposed else w.mT, offsets)


def grouped_grad_input_reference(
    grad: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float = DENSITY,
    choose: bool = False,
) -> Tensor:
    """Gradient of :func:`grouped_linear_reference` with respect to ``x``, in ``grad``'s dtype."""
    w = _masked(weight, index, block).to(grad.dtype)
    return _multiplied(grad.contiguous(), w.mT if transposed else w, offsets)


def grouped_grad_weight_reference(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    dtype: torch.dtype,
    density: float = DENSITY,
    choose: bool = False,
) -> Tensor:
    """Gradient with respect to ``weight``, in ``dtype``: exact 0 outside the active blocks, unless the index of a
    matrix asks for a dense one, and 0 for matrices without rows."""
    # Of bfloat16 operands the product would come rounded to bfloat16, however precise the gradient shall be.
    computed = torch.promote_types(grad.dtype, dtype)
    rows, cols = (x, grad) if transposed else (grad, x)
    a, b = rows.contiguous().to(computed), cols.contiguous().to(computed)
    found = grad.new_zeros((offsets.shape[0], a.shape[1], b.shape[1]), dtype=dtype)
    for e, (start, end) in enumerate(groups(offsets, grad.shape[0])):
        if start < end:
            own = (a[start:end].t() @ b[start:end]).to(dtype)
            found[e] = own if int(index[e, DENSE_GRAD]) else masked(own, index[e], block)
    return found


define(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets, Tensor index, int block, bool transposed,"
    " float density=0.2, bool choose=False) -> Tensor",
    grouped_linear_reference,
)
define(
    "grouped_linear_grad_input(Tensor grad, Tensor weight, Tensor offsets, Tensor index, int block, bool transposed,"
    " float density=0.2, bool choose=False) -> Tensor",
    grouped_grad_input_reference,
)
define(
    "grouped_linear_grad_weight(Tensor grad, Tensor x, Tensor offsets, Tensor index, int block, bool transposed,"
    " ScalarType dtype, float density=0.2, bool choose=False) -> Tensor",
    grouped_grad_weight_reference,
)


@torch.library.register_fake(_LINEAR)
def _(x: Tensor, weight: Tensor, offsets: Any, index: Any, block: int, transposed: bool, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))


@torch.library.register_fake(_GRAD_INPUT)
def _(grad: Tensor, weight: Tensor, offsets: Any, index: Any, block: int, transposed: bool, *_: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1 if transposed else 2]))


@torch.library.register_fake(_GRAD_WEIGHT)
def _(
    grad: Tensor, x: Tensor, offsets: Tensor, index: Any, block: int, transposed: bool, dtype: torch.dtype, *_: Any
) -> Tensor:
    rows, cols = (x, grad) if transposed else (grad, x)
    return grad.new_empty((offsets.shape[0], rows.shape[1], cols.shape[1]), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, index, ctx.block, ctx.transposed, *ctx.rest = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, offsets, index)
    ctx.weight_dtype = weight.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets, index = ctx.saved_tensors
    grad_x = grad_w = None
    grad = side_by_side(grad)
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.mst.grouped_linear_grad_input(
            grad, weight, offsets, index, ctx.block, ctx.transposed, *ctx.rest
        )
    if ctx.needs_input_grad[1]:
        grad_w = torch.ops.mst.grouped_linear_grad_weight(
            grad, x, offsets, index, ctx.block, ctx.transposed, ctx.weight_dtype, *ctx.rest
        )
    return grad_x, grad_w, *([None] * (4 + len(ctx.rest)))


torch.library.register_autograd(_LINEAR, _backward, setup_context=_save)


# -- double backward: of graphs that run without AOTAutograd, which knows none -----------------------------------------


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, offsets, index, ctx.block, ctx.transposed, *ctx.rest = inputs
    ctx.save_for_backward(grad, weight, offsets, index)


def _backward_of_grad_input(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    """``grad W`` is linear in both, as in :mod:`mst_compile.ops.linear`."""
    grad, weight, offsets, index = ctx.saved_tensors
    of_grad = of_weight = None
    if ctx.needs_input_grad[0]:
        of_grad = torch.ops.mst.grouped_linear(outer, weight, offsets, index, ctx.block, ctx.transposed, *ctx.rest)
    if ctx.needs_input_grad[1]:
        of_weight = torch.ops.mst.grouped_linear_grad_weight(
            grad, outer, offsets, index, ctx.block, ctx.transposed, weight.dtype, *ctx.rest
        )
    return of_grad, of_weight, *([None] * (4 + len(ctx.rest)))


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, offsets, index, ctx.block, ctx.transposed, _, *ctx.rest = inputs
    ctx.save_for_backward(grad, x, offsets, index)


def _backward_of_grad_weight(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    """What comes for the weight's gradient stands in for the weight, where that gradient is not always 0."""
    grad, x, offsets, index = ctx.saved_tensors
    dense = index[:, DENSE_GRAD].bool()[:, None, None]
    w = torch.where(dense, outer, _masked(outer, index, ctx.block)).to(grad.dtype)
    w = w if ctx.transposed else w.mT
    return _multiplied(x, w, offsets), _multiplied(grad, w.mT, offsets), *([None] * (5 + len(ctx.rest)))


torch.library.register_autograd(_GRAD_INPUT, _backward_of_grad_input, setup_context=_save_grad_input)
torch.library.register_autograd(_GRAD_WEIGHT, _backward_of_grad_weight, setup_context=_save_grad_weight)
