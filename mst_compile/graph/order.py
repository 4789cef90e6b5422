"""In which order the dimensions of a result stand, for a program and in memory."""

from __future__ import annotations

from torch import Tensor, fx

from mst_compile.graph.fx import Emitter


def laid_out(emit: Emitter, new: fx.Node, dims: str, out_dims: str, out: Tensor) -> fx.Node:
    """The result with its dimensions in the program's order, and in memory in the order that they had there, as what
    follows may rely on it."""
    stored = stored_order(out_dims, out)
    if stored != dims:
        new = emit("contiguous", emit("permute", new, *map(dims.index, stored)))
    return new if stored == out_dims else emit("permute", new, *map(stored.index, out_dims))


def stored_order(out_dims: str, out: Tensor) -> str:
    """The letters of the result's dimensions in the order in which they lie in memory."""
    strides = out.stride()
    order = range(out.dim())
    if all(type(stride) is int for stride in strides):
        order = sorted(order, key=lambda dim: -strides[dim])  # type: ignore[assignment]
    return "".join(out_dims[dim] for dim in order)
