"""The ``mst::`` operators in Inductor. Importing this module registers their lowerings.

Each operator goes to the lowering in its device's record (:mod:`mst_compile.lowering.device`). Where the record has
none, or the lowering declines, the operator itself is called: the device's implementation, or the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import constrain_to_fx_strides, fallback_handler, register_lowering
from torch._inductor.virtualized import V

from . import device


def _as_traced(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The operands with the order of strides that they had when the graph was traced.

    Each is computed first, once for all that read it: what is not would be copied to get its strides, and so computed
    again for every product that reads it.
    """
    for arg in args:
        if isinstance(arg, ir.TensorBox):
            arg.realize()
    return constrain_to_fx_strides(V.graph.current_node, *args)[0]


def _register(operator: Any) -> None:
    name = operator._opname
    fallback = fallback_handler(operator, add_to_fallback_set=False)

    @register_lowering(operator, type_promotion_kind=None)
    def lower(*args: Any) -> Any:
        args = _as_traced(args)
        lowering = device.of(args[0].get_device().type).lowerings().get(name)
        out = None if lowering is None else lowering(*args)
        return fallback(*args) if out is None else out


for _operator in (
    torch.ops.mst.linear.default,
    torch.ops.mst.linear_grad_input.default,
    torch.ops.mst.linear_grad_weight.default,
    torch.ops.mst.grouped_linear.default,
    torch.ops.mst.grouped_linear_grad_input.default,
    torch.ops.mst.grouped_linear_grad_weight.default,
    torch.ops.mst.packed_linear.default,
    torch.ops.mst.attention.default,
    torch.ops.mst.attention_backward.default,
):
    _register(_operator)

# Code that comes out of Inductor's cache calls kernels by the names that these modules define, without lowering.
for _device in device.registered():
    _device.lowerings()
