"""Which tensors a kernel may read by their data pointer, and where that leads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.nn import Parameter

# Tensors whose values are not what their pointer leads to, if it leads anywhere: subclasses that intercept operators
# (DTensor, fake and functional tensors, every wrapper), those within functorch's transforms, and lazy ones.
_ELSEWHERE = (
    DispatchKey.Python,
    DispatchKey.Functionalize,
    DispatchKey.FuncTorchBatched,
    DispatchKey.FuncTorchGradWrapper,
    DispatchKey.Negative,
    DispatchKey.Conjugate,
    DispatchKey.ZeroTensor,
    DispatchKey.NestedTensor,
    DispatchKey.Quantized,  # type: ignore[attr-defined]  # PyTorch's stub lacks it
)
_BITS = 0
for _key in _ELSEWHERE:
    _BITS |= DispatchKeySet(_key).raw_repr()


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's values lie in memory where its data pointer, strides and dtype say.

    It asks the dispatcher, not the class: ``nn.Parameter`` and other subclasses that intercept no operator are plain.
    """
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return tensor.layout is torch.strided and not tensor.is_meta and not keys & _BITS


def address_of(tensor: Tensor) -> int:
    """Where the elements are; 0 of tensors that wrap others."""
    return tensor.data_ptr() if type(tensor) in (Parameter, Tensor) else 0


def lying(tensor: Tensor) -> tuple[Any, ...]:
    """Where a plain tensor's elements are, and how they lie there."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as after ``expand``."""
    return _extent(tensor) is None


def fills(tensor: Tensor) -> bool:
    """Whether its elements, in some order, are all that there is between the first of them and the last."""
    return _extent(tensor) == tensor.numel()


def _extent(tensor: Tensor) -> int | None:
    """Elements from the first to the last in memory; None where some share it."""
    extent = min(1, tensor.numel())
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return None
            extent += stride * (size - 1)
    return extent
