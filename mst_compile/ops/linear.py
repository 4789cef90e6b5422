"""The operators ``mst::linear`` and its two gradients: schemas, eager reference, fakes, autograd.

``transposed`` says how the weight is stored: ``False`` for ``[out, in]`` (``nn.Linear``), ``True`` for ``[in, out]``
(Hugging Face ``Conv1D``). ``index`` is the packed index of :mod:`mst_compile.blocks.index`, ``block`` its block edge.
A weight is exactly 0 outside its active blocks, as the sparsifier keeps it: a kernel may skip those zeros or not.
``density`` is the share of active blocks that kernels are tuned for; no result depends on it. It is an argument so that
it belongs to the product: compiled code of another density is another graph, in every cache too. ``choose`` allows a
device to run a dense product where that was measured to be faster. ``rounded`` is the weight in ``x``'s dtype where
somebody has it, for the product and for the gradient of ``x``; no gradient passes it.

The reference below is plain PyTorch on the masked dense weight. It is the oracle of all kernels, and what runs on a
device, dtype or block that has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_compile.blocks.bulk import mask_like
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import DENSE_GRAD

from .library import define

_LINEAR = "mst::linear"
_GRAD_INPUT = "mst::linear_grad_input"
_GRAD_WEIGHT = "mst::linear_grad_weight"
DENSITY = 0.2  # what kernels are tuned for where nobody says; also in the schemas


def masked(weight: Tensor, index: Tensor, block: int) -> Tensor:
    """``weight`` with everything outside the active blocks set to 0."""
    grid = BlockGrid(weight.shape[0], weight.shape[1], block)
    return weight.masked_fill(~mask_like(index, grid), 0)


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float = DENSITY,
    choose: bool = False,
    rounded: Tensor | None = None,
) -> Tensor:
    """``y[..., out] = x[..., in] W + bias`` on the active blocks of ``weight``, in ``x``'s dtype."""
    w = masked(weight if rounded is None else rounded, index, block).to(x.dtype)
    x = x.contiguous()  # PyTorch's bfloat16 product reads past the rows of strided ones on CPUs with AMX
    return torch.nn.functional.linear(x, w.t() if transposed else w, None if bias is None else bias.to(x.dtype))


def grad_input_reference(
    grad: Tensor,
    weight: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float = DENSITY,
    choose: bool = False,
) -> Tensor:
    """Gradient of :func:`linear_reference` with respect to ``x``, in ``grad``'s dtype."""
    w = masked(weight, index, block).to(grad.dtype)
    return grad.contiguous() @ (w.t() if transposed else w)


def grad_weight_reference(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    dtype: torch.dtype,
    bias: bool,
    density: float = DENSITY,
    choose: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``weight`` (exact 0 outside the active blocks, unless the index asks for a dense one)
    in ``dtype``, and ``bias`` in at least float32 (empty if ``bias`` is false)."""
    gy, x2 = grad.reshape(-1, grad.shape[-1]).contiguous(), x.reshape(-1, x.shape[-1]).contiguous()
    # Of bfloat16 operands the product would come rounded to bfloat16, however precise the gradient shall be.
    computed = torch.promote_types(gy.dtype, dtype)
    a, b = (x2, gy) if transposed else (gy, x2)
    gw = (a.t().to(computed) @ b.to(computed)).to(dtype)
    if not int(index[DENSE_GRAD]):
        gw = masked(gw, index, block)
    wide = torch.promote_types(gy.dtype, torch.float32)
    return gw, gy.sum(0, dtype=wide) if bias else gw.new_empty(0, dtype=wide)


define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor index, int block, bool transposed,"
    " float density=0.2, bool choose=False, Tensor? rounded=None) -> Tensor",
    linear_reference,
)
define(
    "linear_grad_input(Tensor grad, Tensor weight, Tensor index, int block, bool transposed,"
    " float density=0.2, bool choose=False) -> Tensor",
    grad_input_reference,
)
define(
    "linear_grad_weight(Tensor grad, Tensor x, Tensor index, int block, bool transposed, ScalarType dtype, bool bias,"
    " float density=0.2, bool choose=False) -> (Tensor, Tensor)",
    grad_weight_reference,
)


@torch.library.register_fake(_LINEAR)
def _(x: Tensor, weight: Tensor, bias: Any, index: Any, block: int, transposed: bool, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


@torch.library.register_fake(_GRAD_INPUT)
def _(grad: Tensor, weight: Tensor, index: Any, block: int, transposed: bool, *_: Any) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[0 if transposed else 1]))


@torch.library.register_fake(_GRAD_WEIGHT)
def _(
    grad: Tensor,
    x: Tensor,
    index: Any,
    block: int,
    transposed: bool,
    dtype: torch.dtype,
    bias: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[-1], grad.shape[-1]) if transposed else (grad.shape[-1], x.shape[-1])
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(grad.shape[-1] if bias else 0, dtype=wide)


def side_by_side(x: Tensor) -> Tensor:
    """``x``, copied if its features do not lie side by side, as kernels want them: of a graph this copy is one for all
    products with it, and written in place of what it was made from; each would else make its own."""
    stride = x.stride(-1)  # of a symbolic one nothing is asked: that would be a guard
    return x if type(stride) is int and stride == 1 else x.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, index, ctx.block, ctx.transposed, *rest = inputs
    ctx.rest, rounded = rest[:2], rest[2] if len(rest) > 2 else None
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, index, rounded if needs_x else None)
    ctx.weight_dtype = weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, index, rounded = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_w = grad_b = None
    grad = side_by_side(grad)
    if needs_x:
        if rounded is not None and not torch.is_grad_enabled():  # else there may be a gradient of this one's weight
            weight = rounded
        grad_x = torch.ops.mst.linear_grad_input(grad, weight, index, ctx.block, ctx.transposed, *ctx.rest)
    if needs_weight:
        grad_w, fused = torch.ops.mst.linear_grad_weight(
            grad, x, index, ctx.block, ctx.transposed, ctx.weight_dtype, needs_bias, *ctx.rest
        )
        grad_b = fused.to(ctx.bias_dtype) if needs_bias else None
    elif needs_bias:
        grad_b = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    return grad_x, grad_w, grad_b, None, None, None, None, None, None


torch.library.register_autograd(_LINEAR, _backward, setup_context=_save)


# -- double backward: of graphs that run without AOTAutograd, which knows none -----------------------------------------


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, index, ctx.block, ctx.transposed, *ctx.rest = inputs
    ctx.save_for_backward(grad, weight, index)


def _backward_of_grad_input(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    """``grad W`` is linear in both: in ``grad`` as :func:`linear_reference` is, in ``W`` as its own gradient is."""
    grad, weight, index = ctx.saved_tensors
    of_grad = of_weight = None
    if ctx.needs_input_grad[0]:
        of_grad = torch.ops.mst.linear(outer, weight, None, index, ctx.block, ctx.transposed, *ctx.rest)
    if ctx.needs_input_grad[1]:
        of_weight, _ = torch.ops.mst.linear_grad_weight(
            grad, outer, index, ctx.block, ctx.transposed, weight.dtype, False, *ctx.rest
        )
    return of_grad, of_weight, *([None] * (3 + len(ctx.rest)))


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, index, ctx.block, ctx.transposed, _, ctx.bias, *ctx.rest = inputs
    ctx.save_for_backward(grad, x, index)


def _backward_of_grad_weight(ctx: Any, outer: Tensor, of_bias: Tensor) -> tuple[Tensor | None, ...]:
    """What comes for the weight's gradient stands in for the weight, where that gradient is not always 0."""
    grad, x, index = ctx.saved_tensors
    w = (outer if int(index[DENSE_GRAD]) else masked(outer, index, ctx.block)).to(grad.dtype)
    w = w.t() if ctx.transposed else w
    of_grad = torch.nn.functional.linear(x, w, of_bias.to(grad.dtype) if ctx.bias else None)
    return of_grad, grad @ w, *([None] * (5 + len(ctx.rest)))


torch.library.register_autograd(_GRAD_INPUT, _backward_of_grad_input, setup_context=_save_grad_input)
torch.library.register_autograd(_GRAD_WEIGHT, _backward_of_grad_weight, setup_context=_save_grad_weight)
