"""How gradients and state lie in memory, where that decides what a step does.

PyTorch's fused optimizers on a CPU walk through a Parameter, its gradient and its state in the order of memory and look
at no strides (seen from 2.11 to 2.13): of a gradient that is the transpose of another tensor they take the elements in
wrong places, of one that was expanded they read beyond its end. A backward pass never leaves such a gradient; what
``torch.autograd.grad`` or a program hands over may be one, and so may be the state of a checkpoint. Of DTensors
the same holds of what each rank holds, which is what these optimizers step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.memory import fills, is_plain, overlaps
from mst_compile.blocks.shards import is_sharded
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
    if gradient is None or (gradient.stride() == parameter.stride() and not is_sharded(gradient)):
        return
    here, there = _held(gradient), _held(parameter)
    if here.stride() == there.stride() or here.shape != there.shape or not is_plain(here):
        return
    if overlaps(here) or (id(parameter) in fused and not _alike(here, there)):
        with torch.no_grad():  # entered here alone: every weight is asked at every step
            parameter.grad = _lying_as(parameter, gradient)


@torch.no_grad()
def lay_out_state(optimizer: Optimizer, own: Iterable[tuple[SparseWeight, nn.Parameter]]) -> None:
    """Let state lie as its Parameter does, where a fused optimizer will take it to.

    Raises:
        OptimizerError: the Parameter itself has gaps, which such an optimizer would take for elements.
    """
    fused = fused_on_cpu(optimizer)
    for weight, parameter in own if fused else ():
        here = _held(parameter)
        if id(parameter) not in fused or not is_plain(here):
            continue
        if not fills(here):
            raise OptimizerError(
                f"{weight.name} has gaps in memory (shape {tuple(here.shape)}, strides {here.stride()}), and "
                f"PyTorch's fused {type(optimizer).__name__} takes what lies there on a CPU for its elements: make the "
                "optimizer with fused=False, or the Parameter from a contiguous copy before sparsify"
            )
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for key, value in list(state_like(optimizer, parameter)):
            own = _held(value)
            if key in state and is_plain(own) and own.shape == here.shape and not _alike(own, here):
                state[key] = _lying_as(parameter, value)


def _held(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def _lying_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a tensor of the same layout over ranks that lies in memory as the Parameter does."""
    like = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
    _held(like).copy_(_held(tensor))
    return like


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether elements of the same place have the same place in memory."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or one == other for size, one, other in pairs)
