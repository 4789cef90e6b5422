"""Inductor lowerings of the ``mst::`` operators. Importing this module registers them.

On the CPU forward and grad-input become calls of an extern kernel with an ``out`` argument: Inductor allocates and
reuses their results like those of a matrix product. grad-weight has two results and stays a call of the operator. On a
GPU all three become generated Triton kernels, see :mod:`mst_compile.lowering.gpu`. Where there is no kernel the
operator's reference is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering, to_dtype
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V

from . import cpu, gpu, gpu_attention, support

_KERNEL = "mst_linear_out"

# Generated wrappers call extern_kernels.mst_linear_out(...), also those that come out of Inductor's cache.
setattr(extern_kernels, _KERNEL, cpu.linear_out)


def _unit_stride(x: Any) -> Any:
    """Realize ``x``, copied only if its features do not lie side by side."""
    x = ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(x))
    strides = x.get_stride()
    return x if V.graph.sizevars.statically_known_equals(strides[-1], 1) else ir.ExternKernel.copy_input(x)


def _extern(x: Any, weight: Any, index: Any, bias: Any, block: int, transposed: bool) -> Any:
    """``x W + bias`` as one extern kernel on ``x`` viewed as ``[M, in]``."""
    view = lowerings[torch.ops.aten.view.default]
    *lead, features = x.get_size()
    out_features = weight.get_size()[1 if transposed else 0]
    rows = x if len(lead) == 1 else view(x, [-1, features])
    operands = [_unit_stride(rows), ir.ExternKernel.require_contiguous(weight), ir.ExternKernel.realize_input(index)]
    if bias is not None:
        operands.append(ir.ExternKernel.require_contiguous(bias))
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [rows.get_size()[0], out_features])
    out = ir.TensorBox.create(
        ir.ExternKernelOut(
            layout,
            operands,
            kwargs={"block": block, "transposed": transposed},
            python_kernel_name=f"extern_kernels.{_KERNEL}",
        )
    )
    return out if len(lead) == 1 else view(out, [*lead, out_features])


def _device_of_kernels(x: Any, weight_dtype: torch.dtype, block: int, out_features: Any) -> str | None:
    """Type of the device whose kernels take these operands, None if the reference must do."""
    device = x.get_device().type
    if support.why_unsupported(device, x.get_dtype(), weight_dtype, block) is not None:
        return None
    # Inductor drops the mask of a template's store where the result has a single element.
    scalar = all(V.graph.sizevars.statically_known_equals(s, 1) for s in (*x.get_size()[:-1], out_features))
    return None if device == "cuda" and scalar else device


def _with_bias(out: Any, bias: Any) -> Any:
    """``out + bias``, which Inductor fuses into the store of the kernel, with whatever pointwise follows."""
    return out if bias is None else lowerings[torch.ops.aten.add.Tensor](out, to_dtype(bias, out.get_dtype()))


@register_lowering(torch.ops.mst.linear.default, type_promotion_kind=None)
def _linear(x: Any, weight: Any, bias: Any, index: Any, block: int, transposed: bool) -> Any:
    device = _device_of_kernels(x, weight.get_dtype(), block, weight.get_size()[1 if transposed else 0])
    if device == "cuda":
        return _with_bias(gpu.linear(x, weight, index, block, not transposed), bias)
    if device == "cpu":
        return _extern(x, weight, index, bias, block, transposed)
    op = torch.ops.mst.linear.default
    return fallback_handler(op, add_to_fallback_set=False)(x, weight, bias, index, block, transposed)


@register_lowering(torch.ops.mst.linear_grad_input.default, type_promotion_kind=None)
def _grad_input(grad: Any, weight: Any, index: Any, block: int, transposed: bool) -> Any:
    device = _device_of_kernels(grad, weight.get_dtype(), block, weight.get_size()[0 if transposed else 1])
    if device == "cuda":
        return gpu.linear(grad, weight, index, block, transposed)
    if device == "cpu":
        return _extern(grad, weight, index, None, block, not transposed)
    op = torch.ops.mst.linear_grad_input.default
    return fallback_handler(op, add_to_fallback_set=False)(grad, weight, index, block, transposed)


@register_lowering(torch.ops.mst.linear_grad_weight.default, type_promotion_kind=None)
def _grad_weight(grad: Any, x: Any, index: Any, block: int, transposed: bool, dtype: torch.dtype, bias: bool) -> Any:
    features = x.get_size()[-1] * grad.get_size()[-1]
    device = _device_of_kernels(grad, dtype, block, features)
    if device == "cuda" and x.get_dtype() == grad.get_dtype() and features != 1:
        return gpu.grad_weight(grad, x, index, block, transposed, dtype, bias)
    op = torch.ops.mst.linear_grad_weight.default
    return fallback_handler(op, add_to_fallback_set=False)(grad, x, index, block, transposed, dtype, bias)


@register_lowering(torch.ops.mst.attention.default, type_promotion_kind=None)
def _attention(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    if _has_attention_kernel(q, k, v):
        return gpu_attention.attention(q, k, v, *rest)
    return fallback_handler(torch.ops.mst.attention.default, add_to_fallback_set=False)(q, k, v, *rest)


@register_lowering(torch.ops.mst.attention_backward.default, type_promotion_kind=None)
def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    if _has_attention_kernel(q, k, v):
        return gpu_attention.attention_backward(grad, q, k, v, *rest)
    return fallback_handler(torch.ops.mst.attention_backward.default, add_to_fallback_set=False)(grad, q, k, v, *rest)


def _has_attention_kernel(q: Any, k: Any, v: Any) -> bool:
    device, dtype = q.get_device().type, q.get_dtype()
    if device != "cuda" or {k.get_dtype(), v.get_dtype()} != {dtype}:
        return False
    return support.why_no_attention(device, dtype, gpu.static(q.get_size()[-1])) is None
