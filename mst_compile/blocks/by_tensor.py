"""What is noted of tensors, by the tensor, for as long as it lives.

A weak reference to a tensor is enough for PyTorch to refuse to swap its content for another's, which is how
``Module.to`` moves DTensors and other tensor subclasses, and under
``torch.__future__.set_swap_module_params_on_conversion`` every Parameter. So all that is noted in this way can be put
aside for as long as that takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_tables: list[ByTensor] = []


class ByTensor(WeakTensorKeyDictionary):
    """A dictionary of tensors, held weakly and compared by identity. Made once, for a module's whole life."""

    def __init__(self) -> None:
        super().__init__()
        _tables.append(self)


@contextlib.contextmanager
def put_aside(*tensors: Tensor) -> Iterator[None]:
    """Nothing here refers to the tensors meanwhile; afterwards all is noted of them that was."""
    noted: list[tuple[ByTensor, Tensor, Any]] = [
        (table, tensor, table.pop(tensor)) for table in _tables for tensor in tensors if tensor in table
    ]
    try:
        yield
    finally:
        for table, tensor, value in noted:
            table[tensor] = value
