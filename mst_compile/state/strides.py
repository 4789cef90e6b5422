"""How gradients and state lie in memory, where that decides what a step does.

PyTorch's fused optimizers on a CPU walk through a Parameter, its gradient and its state in the order of memory and look
at no strides (seen from 2.11 to 2.13): of a gradient that is the transpose of another tensor they take the elements in
wrong places, of one that was expanded they read beyond its end. A backward pass never leaves such a gradient; what
``torch.autograd.grad`` or a program hands over may be one, and so may be the state of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.memory import fills, is_plain, overlaps
from mst_compile.errors import OptimizerError

from .optimizers import state_like
from .weight import SparseWeight


def fused_on_cpu(optimizer: Optimizer) -> set[int]:
    """Ids of the Parameters that an optimizer steps by a fused kernel on the CPU."""
    groups = (group for group in optimizer.param_groups if group.get("fused"))
    return {id(p) for group in groups for p in group["params"] if p.is_cpu}


def lay_out(parameter: Tensor, fused: set[int]) -> None:
    """Let the gradient be one that can be masked in place, and that a fused optimizer reads rightly: another tensor of
    the same values takes its place where it is not."""
    gradient = parameter.grad
    if gradient is None or gradient.stride() == parameter.stride() or not is_plain(gradient):
        return
    if overlaps(gradient) or (id(parameter) in fused and not _alike(gradient, parameter)):
        with torch.no_grad():  # entered here alone: every weight is asked at every step
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


@torch.no_grad()
def lay_out_state(optimizer: Optimizer, own: Iterable[tuple[SparseWeight, nn.Parameter]]) -> None:
    """Let state lie as its Parameter does, where a fused optimizer will take it to.

    Raises:
        OptimizerError: the Parameter itself has gaps, which such an optimizer would take for elements.
    """
    fused = fused_on_cpu(optimizer)
    for weight, parameter in own if fused else ():
        if id(parameter) not in fused or not is_plain(parameter):
            continue
        if not fills(parameter):
            raise OptimizerError(
                f"{weight.name} has gaps in memory (shape {tuple(parameter.shape)}, strides {parameter.stride()}), and "
                f"PyTorch's fused {type(optimizer).__name__} takes what lies there on a CPU for its elements: make the "
                "optimizer with fused=False, or the Parameter from a contiguous copy before sparsify"
            )
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for key, value in list(state_like(optimizer, parameter)):
            if key in state and is_plain(value) and not _alike(value, parameter):
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether elements of the same place have the same place in memory."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in pairs)
