"""Buffers that a rewrite relied on, watched: they enter a graph as inputs, and Dynamo does not guard their values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Constant:
    """A buffer whose value a rewrite relies on: ``position`` among the graph's placeholders, and the value."""

    def __init__(self, position: int, buffer: Tensor) -> None:
        self.position = position
        self._value = buffer.detach().cpu().clone()
        self._versions = WeakIdKeyDictionary()  # other modules may share the graph, each with a buffer of its own
        self._versions[buffer] = buffer._version

    def holds(self, buffer: Tensor) -> bool:
        """Whether this input has the value that was relied on; compares numbers only where it was written to."""
        if self._versions.get(buffer) != buffer._version:
            same = buffer.shape == self._value.shape and buffer.dtype == self._value.dtype
            if not same or not torch.equal(buffer.detach().cpu(), self._value):
                return False
            self._versions[buffer] = buffer._version
        return True
