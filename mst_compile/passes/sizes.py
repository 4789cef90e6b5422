"""Sizes of a graph's tensors at one call, where Dynamo made them symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .linear import value


class Sizes:
    """Reads the symbols of a graph's sizes off its inputs."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._sources: dict[sympy.Symbol, tuple[int, int | None]] = {}  # symbol -> input, and dimension of a tensor
        for i, node in enumerate(n for n in graph_module.graph.nodes if n.op == "placeholder"):
            example = value(node)
            if isinstance(example, torch.SymInt):
                self._add(example, i, None)
            elif isinstance(example, Tensor):
                for dim, size in enumerate(example.shape):
                    self._add(size, i, dim)

    def _add(self, size: Any, position: int, dim: int | None) -> None:
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            self._sources.setdefault(size.node.expr, (position, dim))

    def of(self, shape: Sequence[Any], args: Sequence[Any]) -> tuple[int, ...]:
        """``shape``, of a tensor in the graph, in the call with ``args``."""
        known = {
            symbol: int(args[position] if dim is None else args[position].shape[dim])
            for symbol, (position, dim) in self._sources.items()
        }
        return tuple(s if isinstance(s, int) else int(s.node.expr.subs(known)) for s in shape)
