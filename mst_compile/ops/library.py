"""The ``mst::`` operator library: schemas and references here, implementations for devices from below.

A device's implementation may decline (return None); then the operator's reference runs. So whatever operands come,
every operator computes, and nothing here knows a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler

from mst_compile.blocks.memory import is_plain

from .watching import marked

library = torch.library.Library("mst", "DEF")
# What strides operands need, the lowerings say. Were it a tag, Inductor would see to it before it calls them, by a copy
# for each of an operand's readers where the operand is something still to be computed.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_references: dict[str, Callable[..., Any]] = {}


def define(schema: str, reference: Callable[..., Any]) -> None:
    """Define an operator by its schema, with ``reference`` as what runs where no device has anything better."""
    name = schema.partition("(")[0]
    library.define(schema, tags=_TAGS)
    library.impl(name, reference, "CompositeExplicitAutograd")
    _references[name] = reference


def implement(name: str, dispatch_key: str, function: Callable[..., Any]) -> None:
    """Let ``function`` compute the operator on a device; it takes the operator's arguments.

    Args:
        name: of the operator, without its namespace.
        dispatch_key: PyTorch's key of the device, ``"CPU"`` or ``"CUDA"``.
        function: returns the operator's result, or None for operands that it has no kernel for. It is asked of plain
            tensors alone: the data pointer of one that is not leads elsewhere, see :func:`is_plain`.
    """
    reference = _references[name]

    def dispatch(*args: Any) -> Any:
        if profiler._is_profiler_enabled:
            with marked(name, args):
                return compute(*args)
        return compute(*args)

    def compute(*args: Any) -> Any:
        plain = all(is_plain(operand) for operand in args if isinstance(operand, torch.Tensor))
        result = function(*args) if plain else None
        return reference(*args) if result is None else result

    library.impl(name, dispatch, dispatch_key)
