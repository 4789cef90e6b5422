"""Parameters whose content PyTorch swaps for another's: they stay sparse.

``Module.to`` and its relatives move DTensors in this way, as tensor parallelism makes them, and every Parameter under
``torch.__future__.set_swap_module_params_on_conversion``; ``load_state_dict`` does so then too. A Parameter's sparse
state and the hook on its gradient belong to its content as PyTorch sees it, and weak references to it, or to its
gradient, are not allowed at all.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mst_compile.blocks.by_tensor import put_aside

from . import binding
from .weight import SparseWeight

_KEEPS = "_mst_keeps"


def watch_swaps() -> None:
    """Keep sparse what is swapped through ``torch.utils.swap_tensors`` from now on, in this process."""
    if not hasattr(torch.utils.swap_tensors, _KEEPS):
        torch.utils.swap_tensors = _keeping(torch.utils.swap_tensors)


def _keeping(original: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    @functools.wraps(original)
    def swap_tensors(t1: Tensor, t2: Tensor) -> Any:
        if not (weakref.getweakrefs(t1) or weakref.getweakrefs(t2)):
            return original(t1, t2)
        weights = [(tensor, binding.of(tensor)) for tensor in (t1, t2)]
        _forget_masked(t1, t2)
        for tensor, weight in weights:
            if weight is not None:
                binding.unbind(tensor)
        try:
            with put_aside(t1, t2):
                return original(t1, t2)
        finally:
            for tensor, weight in weights:
                _restore(tensor, weight)

    setattr(swap_tensors, _KEEPS, True)
    return swap_tensors


def _restore(tensor: Tensor, weight: SparseWeight | None) -> None:
    if weight is not None and tensor.shape == weight.shape:  # else it is looked at as one that was replaced
        binding.bind(tensor, weight)


def _forget_masked(*tensors: Tensor) -> None:
    """Nothing is known any more of gradients among the tensors."""
    for weight in binding.weights():
        known = weight.masked
        if known is not None and any(known[0]() is tensor for tensor in tensors):
            weight.masked = None
