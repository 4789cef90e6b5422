"""``mst::linear`` and its gradients on the CPU: which kernel runs.

Eager mode and compiled code run the same functions. Inductor reaches them as *extern kernels* with an ``out``
argument, so that it plans and reuses the memory of their results; see :mod:`mst_compile.lowering.cpu_inductor`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor
from torch.autograd import profiler

from mst_compile.blocks.index import DENSE_GRAD, NNZ
from mst_compile.ops.watching import counters, marked

from . import cpu_choice, cpu_dense, cpu_times


def why_unsupported(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: int) -> str | None:
    """Why there is no CPU kernel for these operands, or None if there is one."""
    reason = kernels.why_unavailable()
    if reason is not None:
        return f"no kernels: {reason}"
    if not kernels.supports(block, x_dtype, weight_dtype):
        return f"no CPU kernel for block {block}, input {x_dtype}, weight {weight_dtype}"
    return None


def why_no_bias(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot add a bias of this dtype, or None if they can."""
    return None if kernels.supports_dtype(dtype) else f"no CPU kernel for a bias in {dtype}"


def supported(block: int, x: Tensor, weight_dtype: torch.dtype, *more: Tensor) -> bool:
    """Whether there is a kernel for a product with ``x``, and all operands are where it can read them."""
    on_cpu = all(operand.device.type == "cpu" for operand in (x, *more))
    return on_cpu and kernels.supports(block, x.dtype, weight_dtype) and kernels.available()


def rows_of(x: Tensor) -> Tensor:
    """``x`` as ``[M, features]`` with unit stride along the features."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if kernels.has_unit_stride(flat) else flat.contiguous()


# -- eager: allocate, then run the out variant ------------------------------------------------------------------------


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float = 0.0,
    choose: bool = False,
    rounded: Tensor | None = None,
) -> Tensor | None:
    """``mst::linear``; None where there is no kernel. The weight is read as it is, where it is not 0."""
    bias_fits = bias is None or (bias.device.type == "cpu" and why_no_bias(bias.dtype) is None)
    if not supported(block, x, weight.dtype, weight, index) or not bias_fits:
        return None
    out = x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))
    linear_out(x, weight, index, bias, block=block, transposed=transposed, choose=choose, out=out)
    return out


def grad_input(
    grad: Tensor,
    weight: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float = 0.0,
    choose: bool = False,
) -> Tensor | None:
    """``mst::linear_grad_input``; None where there is no kernel."""
    if not supported(block, grad, weight.dtype, weight, index):
        return None
    out = grad.new_empty((*grad.shape[:-1], weight.shape[0 if transposed else 1]))
    linear_out(grad, weight, index, block=block, transposed=not transposed, choose=choose, out=out)
    return out


def grad_weight(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    block: int,
    transposed: bool,
    dtype: torch.dtype,
    bias: bool,
    density: float = 0.0,
    choose: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """``mst::linear_grad_weight``; None where there is no kernel, and for a gradient on all blocks."""
    if not supported(block, grad, dtype, x, index) or grad.dtype != x.dtype or kernels.number_at(index, DENSE_GRAD):
        return None
    gy, x2 = rows_of(grad), rows_of(x)
    a, b = (x2, gy) if transposed else (gy, x2)
    gw = torch.empty(a.shape[1], b.shape[1], dtype=dtype, device="cpu")
    gb = torch.empty(gy.shape[1] if bias else 0, dtype=torch.float32, device="cpu")
    operands = a, b, index.contiguous(), block, gw, gb if bias else None, not transposed
    if choose and _is_dense_faster(cpu_times.GRAD_WEIGHT, gw, block, x2, bias, index):
        cpu_dense.grad_weight(*operands)
    else:
        kernels.grad_weight(*operands)
    return gw, gb


def _is_dense_faster(kind: str, weight: Tensor, block: int, x: Tensor, bias: bool, index: Tensor) -> bool:
    """Of a product with ``x`` ``[M, features]``; ``weight`` is one, or its gradient."""
    if not x.numel() or not weight.numel():
        return False
    product = product_of(kind, *weight.shape, block, x.shape[0], x.dtype, weight.dtype, bias, torch.get_num_threads())
    return cpu_choice.is_dense_faster(product, kernels.number_at(index, NNZ))


@functools.lru_cache(maxsize=4096)  # asked at every call, and so after caches have lost what it takes to answer
def product_of(
    kind: str,
    rows: int,
    cols: int,
    block: int,
    tokens: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias: bool,
    threads: int,
) -> cpu_times.Product:
    """What is asked about a product of so many tokens; of how many is a matter of the threads too."""
    return cpu_times.Product(kind, rows, cols, block, cpu_times.bucket(tokens), dtype, weight_dtype, bias)


# -- out variants, called by Inductor's generated code ----------------------------------------------------------------


def _watched(name: str) -> Callable[..., Tensor]:
    """:func:`linear_out` as compiled code calls it for the operator ``mst::<name>``: seen by who watches."""

    def run(x: Tensor, weight: Tensor, index: Tensor, *bias: Tensor, **options: Any) -> Tensor:
        if not (profiler._is_profiler_enabled or counters):
            return linear_out(x, weight, index, *bias, **options)
        added = (bias[0] if bias else None,) if name == "linear" else ()
        with marked(name, (x, weight, *added, index, options["block"]), unseen=True):
            return linear_out(x, weight, index, *bias, **options)

    return run


forward_out, grad_input_out = _watched("linear"), _watched("linear_grad_input")


def grad_weight_made(*args: Any) -> tuple[Tensor, Tensor]:
    """``mst::linear_grad_weight`` as compiled code calls it: without the dispatcher, which takes as long as all else
    of the call. Operands without a kernel, and who watches, go by way of it."""
    watched = profiler._is_profiler_enabled or counters
    made = None if watched else grad_weight(*args)
    return torch.ops.mst.linear_grad_weight.default(*args) if made is None else made  # type: ignore[no-any-return]


def linear_out(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    block: int,
    transposed: bool,
    choose: bool = False,
    out: Tensor,
) -> Tensor:
    """``out[..., :] = x W + bias``. Grad-input is the same product with the other orientation of the weight.

    Operands may have any layout (other ones than the kernels' are copied), ``out`` is contiguous. With ``choose`` the
    faster one of our product and the dense one runs.
    """
    flat, rows = out if out.dim() == 2 else out.view(-1, out.shape[-1]), rows_of(x)
    kind = cpu_times.COLS if transposed else cpu_times.ROWS
    if choose and _is_dense_faster(kind, weight, block, rows, bias is not None, index):
        cpu_dense.linear(rows, weight, bias, not transposed, flat)
    else:
        bias = None if bias is None else bias.contiguous()
        weight = weight if kernels.has_unit_stride(weight) else weight.contiguous()  # columns of a weight have it too
        kernels.spmm(rows, weight, bias, index.contiguous(), block, not transposed, flat)
    return out
