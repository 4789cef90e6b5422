"""In which order the dimensions of a result stand, for a program and in memory."""

from __future__ import annotations

from torch import Tensor, fx

from mst_compile.graph.fx import Emitter


def laid_out(emit: Emitter, new: fx.Node, dims: str, out_dims: str, out: Tensor) -> fx.Node:
    """The result with its dimensions in the program's order, and in memory in the order that they had there, as what
    follows may rely on it."""
    strides = out.stride()
    order = range(out.dim())
    if all(type(stride) is int for stride in strides):
        order = sorted(order, key=lambda dim: -strides[dim])  # type: ignore[assignment]
    stored = "".join(out_dims[dim] for dim in order)
    if stored != dims:
        new = emit("contiguous", emit("permute", new, *map(dims.index, stored)))
    return new if stored == out_dims else emit("permute", new, *map(stored.index, out_dims))
