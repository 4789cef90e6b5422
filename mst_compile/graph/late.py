"""A graph without sparse weights, which may come in later.

``sparsify`` may be called after the first compiled call, and Dynamo may let a dense and a sparse model, or two layers
of one model, share a graph. Guards know nothing of masks, so the graph looks for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mst_compile.blocks.shards import behind
from mst_compile.graph.compiler import CompileFn, compiling_late, given_inputs, late_examples
from mst_compile.graph.copies import clone
from mst_compile.graph.dispatch import Dispatch
from mst_compile.state import binding
from mst_compile.state.indexes import epoch
from mst_compile.state.uses import note_compiled


class Late:
    """The callable that Dynamo runs in place of a graph that holds no sparse parameter yet.

    Args:
        dense_threshold: as for :class:`Dispatch`, which takes over once a sparse parameter comes in.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        compile_fn: CompileFn,
        dense_threshold: float | None,
    ) -> None:
        given = given_inputs(graph_module, example_inputs)
        self._parameters = [i for i, x in enumerate(given) if isinstance(x, torch.nn.Parameter)]
        self._compile_fn, self._dense_threshold = compile_fn, dense_threshold
        self._graph: fx.GraphModule | None = clone(graph_module) if self._parameters else None
        self._tracing = torch._guards.TracingContext.try_get()
        self._context = torch._guards.CompileContext.try_get()
        self._examples = late_examples(self._tracing, example_inputs) if self._parameters else []
        self._epoch = epoch.value
        self._run = compile_fn(graph_module, example_inputs)

    def __call__(self, *args: Any) -> Any:
        if self._epoch != epoch.value and self._graph is not None:
            self._epoch = epoch.value
            self._look(self._graph, args)
        return self._run(*args)

    def _look(self, graph_module: fx.GraphModule, args: Sequence[Any]) -> None:
        """Make way for a :class:`Dispatch` if a sparse parameter has come in."""
        given = {i: behind(args[i]) for i in self._parameters}
        states = ((i, binding.of(x)) for i, x in given.items())
        found = {i: weight for i, weight in states if weight is not None}
        if found:
            note_compiled(given[i] for i in found)  # type: ignore[misc]
            with compiling_late(self._tracing, self._context):
                self._run = Dispatch(
                    graph_module, self._examples, found, self._compile_fn, self._dense_threshold, first_call=args
                )
            self._graph, self._examples, self._tracing, self._context = None, [], None, None
