"""Inductor lowerings of the ``mst::`` operators on NVIDIA GPUs: which operands go to our Triton templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._inductor.lowering import lowerings, to_dtype
from torch._inductor.virtualized import V

from mst_compile.ops.linear import DENSITY

from . import device, gpu, gpu_attention, gpu_grouped, gpu_operands


def _takes(x: Any, weight_dtype: torch.dtype, block: int, out_features: Any) -> bool:
    if device.of("cuda").why_unsupported(x.get_dtype(), weight_dtype, block) is not None:
        return False
    # Inductor drops the mask of a template's store where the result has a single element.
    return not all(V.graph.sizevars.statically_known_equals(s, 1) for s in (*x.get_size()[:-1], out_features))


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
) -> Any:
    if not _takes(x, weight.get_dtype(), block, weight.get_size()[1 if transposed else 0]):
        return None
    out = gpu.linear(x, weight if rounded is None else rounded, index, block, not transposed, density)
    # Inductor fuses the bias into the store of the kernel, with whatever pointwise follows.
    return out if bias is None else lowerings[torch.ops.aten.add.Tensor](out, to_dtype(bias, out.get_dtype()))


def _grad_input(
    grad: Any, weight: Any, index: Any, block: int, transposed: bool, density: float = DENSITY, *_: Any
) -> Any:
    if not _takes(grad, weight.get_dtype(), block, weight.get_size()[0 if transposed else 1]):
        return None
    return gpu.linear(grad, weight, index, block, transposed, density)


def _grad_weight(
    grad: Any,
    x: Any,
    index: Any,
    block: int,
    transposed: bool,
    dtype: torch.dtype,
    bias: bool,
    density: float = DENSITY,
    *_: Any,
) -> Any:
    features = x.get_size()[-1] * grad.get_size()[-1]
    if features == 1 or x.get_dtype() != grad.get_dtype() or not _takes(grad, dtype, block, features):
        return None
    return gpu.grad_weight(grad, x, index, block, transposed, dtype, bias, density)


def _grouped_linear(
    x: Any, weight: Any, offsets: Any, index: Any, block: int, transposed: bool, density: float = DENSITY, *_: Any
) -> Any:
    if not _takes(x, weight.get_dtype(), block, weight.get_size()[2 if transposed else 1]):
        return None
    return gpu_grouped.linear(x, weight, offsets, index, block, not transposed, density)


def _grouped_grad_input(
    grad: Any, weight: Any, offsets: Any, index: Any, block: int, transposed: bool, density: float = DENSITY, *_: Any
) -> Any:
    if not _takes(grad, weight.get_dtype(), block, weight.get_size()[1 if transposed else 2]):
        return None
    return gpu_grouped.linear(grad, weight, offsets, index, block, transposed, density)


def _grouped_grad_weight(
    grad: Any,
    x: Any,
    offsets: Any,
    index: Any,
    block: int,
    transposed: bool,
    dtype: torch.dtype,
    density: float = DENSITY,
    *_: Any,
) -> Any:
    elements = x.get_size()[-1] * grad.get_size()[-1] * offsets.get_size()[0]
    if elements == 1 or x.get_dtype() != grad.get_dtype() or not _takes(grad, dtype, block, elements):
        return None
    return gpu_grouped.grad_weight(grad, x, offsets, index, block, transposed, dtype, density)


def _takes_attention(q: Any, k: Any, v: Any) -> bool:
    dtype = q.get_dtype()
    same = {k.get_dtype(), v.get_dtype()} == {dtype}
    sizes = (gpu_operands.static(x.get_size()[-1]) for x in (q, v))
    return same and device.of("cuda").why_no_attention(dtype, *sizes) is None


def _attention(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return gpu_attention.attention(q, k, v, *rest) if _takes_attention(q, k, v) else None


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return gpu_attention.attention_backward(grad, q, k, v, *rest) if _takes_attention(q, k, v) else None


LOWERINGS: Mapping[str, Callable[..., Any]] = {
    "linear": _linear,
    "linear_grad_input": _grad_input,
    "linear_grad_weight": _grad_weight,
    "grouped_linear": _grouped_linear,
    "grouped_linear_grad_input": _grouped_grad_input,
    "grouped_linear_grad_weight": _grouped_grad_weight,
    "attention": _attention,
    "attention_backward": _attention_backward,
}
