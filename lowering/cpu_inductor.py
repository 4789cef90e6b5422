"""Inductor lowerings of the ``mst::`` operators on the CPU.

Forward and grad-input become calls of an extern kernel with an ``out`` argument: Inductor allocates and reuses their
results like those of a matrix product. grad-weight and attention have several results: they stay calls that allocate
them, of attention of the operator, of grad-weight of the function behind it. Under ``cpp_wrapper`` everything stays a
call of the operator: that code is C++ and calls no function of Python's but through one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V

from mst_compile.ops.linear import DENSITY

from . import cpu_linear, cpu_packed

_FORWARD, _GRAD_INPUT, _PACKED = "mst_linear_out", "mst_linear_grad_input_out", "mst_packed_linear_out"
_GRAD_WEIGHT = "mst_linear_grad_weight"

# Generated wrappers call extern_kernels.mst_linear_out(...), also those that come out of Inductor's cache.
setattr(extern_kernels, _FORWARD, cpu_linear.forward_out)
setattr(extern_kernels, _GRAD_INPUT, cpu_linear.grad_input_out)
setattr(extern_kernels, _GRAD_WEIGHT, cpu_linear.grad_weight_made)
setattr(extern_kernels, _PACKED, cpu_packed.packed_linear_out)


def _unit_stride(x: Any) -> Any:
    """Realize ``x``, copied only if its features do not lie side by side."""
    x = ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(x))
    strides = x.get_stride()
    return x if V.graph.sizevars.statically_known_equals(strides[-1], 1) else ir.ExternKernel.copy_input(x)


def _linear(
    x: Any,
    weight: Any,
    bias: Any,
    index: Any,
    block: int,
    transposed: bool,
    density: float = DENSITY,
    choose: bool = False,
    rounded: Any = None,
    *,
    kernel: str = _FORWARD,
) -> Any:
    """``x W + bias`` as one extern kernel on ``x`` viewed as ``[M, in]``."""
    reason = cpu_linear.why_unsupported(x.get_dtype(), weight.get_dtype(), block)
    if reason is not None or (bias is not None and cpu_linear.why_no_bias(bias.get_dtype()) is not None):
        return None
    if V.graph.cpp_wrapper:
        return None
    outputs = weight.get_size()[1 if transposed else 0]
    weight = _unit_stride(weight)  # part of a weight, perhaps, which is read where it lies
    return _product(kernel, x, weight, index, bias, outputs, block=block, transposed=transposed, choose=choose)


def _product(kernel: str, x: Any, held: Any, index: Any, bias: Any, outputs: Any, **options: Any) -> Any:
    """``[..., outputs]``: an extern kernel of ``x`` viewed as ``[M, in]``, what is held of a weight, as it lies, and a
    contiguous index and perhaps bias."""
    view = lowerings[torch.ops.aten.view.default]
    *lead, features = x.get_size()
    rows = x if len(lead) == 1 else view(x, [-1, features])
    contiguous = [index] if bias is None else [index, bias]
    inputs = [_unit_stride(rows), held, *map(ir.ExternKernel.require_contiguous, contiguous)]
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [rows.get_size()[0], outputs])
    out = ir.TensorBox.create(
        ir.ExternKernelOut(layout, inputs, kwargs=options, python_kernel_name=f"extern_kernels.{kernel}")
    )
    return out if len(lead) == 1 else view(out, [*lead, outputs])


def _grad_input(grad: Any, weight: Any, index: Any, block: int, transposed: bool, *tuning: Any) -> Any:
    return _linear(grad, weight, None, index, block, not transposed, *tuning, kernel=_GRAD_INPUT)


def _grad_weight(*args: Any) -> tuple[Any, ...]:
    results: Any = ir.FallbackKernel.create(torch.ops.mst.linear_grad_weight.default, *args)
    results[0].inputs[0].python_kernel_name = f"extern_kernels.{_GRAD_WEIGHT}"
    return tuple(ir.TensorBox.create(result) for result in results)


def _packed_linear(x: Any, values: Any, index: Any, bias: Any, outputs: int, block: int, version: int) -> Any:
    # A change of the call below is one of the version: caches of other backends' code have no hash of us in their keys.
    reason = cpu_packed.why_not(x.get_dtype(), block, None if bias is None else bias.get_dtype())
    if V.graph.cpp_wrapper or reason is not None:
        return None
    values = ir.ExternKernel.require_contiguous(values)
    return _product(_PACKED, x, values, index, bias, outputs, block=block)


LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "linear": _linear,
    "linear_grad_input": _grad_input,
    "linear_grad_weight": _grad_weight,
    "packed_linear": _packed_linear,
}
