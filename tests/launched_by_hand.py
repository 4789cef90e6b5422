"""Kernels that are launched by hand, not by Inductor: in Triton's interpreter, on tensors of the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from mst_compile.kernels.triton import tables
from triton.runtime.interpreter import InterpretedFunction


@contextlib.contextmanager
def interpreted(module: ModuleType, kernel: str) -> Iterator[None]:
    """The kernel of this name is interpreted, and its tables stay where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, kernel, InterpretedFunction(getattr(module, kernel).fn))
        patch.setattr(tables, "upload", lambda tensor, device: tensor)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        yield
