"""Which part of a matrix a node is a view of, however the program takes it: by ``chunk``, ``split``, ``narrow``, by
slices, or by way of more dimensions (``w.view(3, n, m)[1]``); and which matrices of a stack it holds copies of."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mst_compile.blocks.layout import Part
from mst_compile.graph.fx import computes, name, storage, value

# By name; of what they return it is asked where it lies. None of them changes what is in memory, and a gradient passes
# each of them as it is.
_VIEWS = {
    "getitem", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "narrow", "select", "unbind",
    "view", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "slice",
}  # fmt: skip


def is_view(node: Any) -> bool:
    """Whether a node is of the calls that may lead to a part."""
    if not isinstance(node, fx.Node) or not computes(node) or not node.args:
        return False
    called = name(node).partition(".")[0]  # of operators, as compiled autograd has them, without the overload
    return called in _VIEWS and isinstance(node.args[0], fx.Node)


def before_part(node: Any) -> tuple[fx.Node, Part] | None:
    """The matrix that ``node``, a matrix too, is a part of in the same memory, and which part; None if it is none."""
    tensor, memory = value(node), storage(node)
    if not isinstance(tensor, Tensor) or memory is None:
        return None
    source = node
    while is_view(source):
        source = source.args[0]
        part = _part(value(source), tensor) if storage(source) == memory else None
        if part is not None:
            return source, part
    return None


def _part(whole: Tensor, view: Tensor) -> Part | None:
    """Which part of the matrix ``whole`` a view of its memory is; None where it is no rectangle of it."""
    known = [*whole.shape, *view.shape, *whole.stride(), whole.storage_offset(), view.storage_offset()]
    if whole.dim() != 2 or view.dim() != 2 or any(type(number) is not int for number in known):
        return None
    strides, first = whole.stride(), int(view.storage_offset() - whole.storage_offset())
    if view.stride() != strides or min(strides) != 1 or first < 0:
        return None
    outer, inner = divmod(first, max(strides))
    row, col = (outer, inner) if strides[1] == 1 else (inner, outer)
    inside = row + view.shape[0] <= whole.shape[0] and col + view.shape[1] <= whole.shape[1]
    return Part(row, col, *view.shape) if inside else None


def turned(part: Part) -> Part:
    """The same elements in the transposed matrix."""
    return Part(part.col, part.row, part.cols, part.rows)


def within(outer: Part, inner: Part) -> Part:
    """A part of a part, as one of the whole."""
    return Part(outer.row + inner.row, outer.col + inner.col, inner.rows, inner.cols)


def before_choice(node: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """The stack of matrices of which ``node`` holds one for each entry of a list of numbers, and that list; None and
    None if it is something else."""
    if not isinstance(node, fx.Node) or not computes(node) or len(node.args) < 2:
        return None, None
    source, at = node.args[0], node.args[-1]
    if node.target is not operator.getitem and (name(node) != "index_select" or node.args[1] != 0):
        return None, None
    numbers, stack = value(at), value(source)
    if not isinstance(numbers, Tensor) or numbers.dim() != 1 or not isinstance(stack, Tensor) or stack.dim() != 3:
        return None, None
    whole = not (numbers.is_floating_point() or numbers.dtype in (torch.bool, torch.uint8))
    return (source, at) if whole else (None, None)  # type: ignore[return-value]
