"""``mst::linear`` and its gradients on the CPU: which kernel runs.

Eager mode and compiled code run the same functions. Inductor reaches them as *extern kernels* with an ``out``
argument, so that it plans and reuses the memory of their results; see :mod:`mst_compile.lowering.cpu_inductor`.
"""

from __future__ import annotations

import ctypes

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor

# Layout of the packed index (mst_compile/blocks/index.py): [0] active blocks, [1] gradient wanted on all blocks.
_DENSE_GRAD_OFFSET = 4


def _wants_dense_grad(index: Tensor) -> bool:
    return ctypes.c_int32.from_address(index.data_ptr() + _DENSE_GRAD_OFFSET).value != 0


def why_unsupported(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: int) -> str | None:
    """Why there is no CPU kernel for these operands, or None if there is one."""
    reason = kernels.why_unavailable()
    if reason is not None:
        return f"no kernels: {reason}"
    if not kernels.supports(block, x_dtype, weight_dtype):
        return f"no CPU kernel for block {block}, input {x_dtype}, weight {weight_dtype}"
    return None


def _supported(x: Tensor, weight_dtype: torch.dtype, index: Tensor, block: int) -> bool:
    on_cpu = x.device.type == index.device.type == "cpu"
    return on_cpu and kernels.supports(block, x.dtype, weight_dtype) and kernels.available()


def _rows(x: Tensor) -> Tensor:
    """``x`` as ``[M, features]`` with unit stride along the features."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


# -- eager: allocate, then run the out variant ------------------------------------------------------------------------


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, block: int, transposed: bool, density: float = 0.0
) -> Tensor | None:
    """``mst::linear``; None where there is no kernel."""
    if not _supported(x, weight.dtype, index, block) or not weight.is_contiguous():
        return None
    out = x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))
    linear_out(x, weight, index, bias, block=block, transposed=transposed, out=out)
    return out


def grad_input(
    grad: Tensor, weight: Tensor, index: Tensor, block: int, transposed: bool, density: float = 0.0
) -> Tensor | None:
    """``mst::linear_grad_input``; None where there is no kernel."""
    if not _supported(grad, weight.dtype, index, block) or not weight.is_contiguous():
        return None
    out = grad.new_empty((*grad.shape[:-1], weight.shape[0 if transposed else 1]))
    linear_out(grad, weight, index, block=block, transposed=not transposed, out=out)
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
) -> tuple[Tensor, Tensor] | None:
    """``mst::linear_grad_weight``; None where there is no kernel, and for a gradient on all blocks."""
    if not _supported(grad, dtype, index, block) or grad.dtype != x.dtype or _wants_dense_grad(index):
        return None
    gy, x2 = _rows(grad), _rows(x)
    a, b = (x2, gy) if transposed else (gy, x2)
    gw = torch.empty(a.shape[1], b.shape[1], dtype=dtype, device="cpu")
    gb = torch.empty(gy.shape[1] if bias else 0, dtype=torch.float32, device="cpu")
    kernels.grad_weight(a, b, index, block, gw, gb if bias else None, not transposed)
    return gw, gb


# -- out variants, called by Inductor's generated code ----------------------------------------------------------------


def linear_out(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    block: int,
    transposed: bool,
    out: Tensor,
) -> Tensor:
    """``out[..., :] = x W + bias``. Grad-input is the same product with the other orientation of the weight."""
    flat = out.view(-1, out.shape[-1])
    kernels.spmm(_rows(x), weight, bias, index, block, not transposed, flat)
    return out
