"""One Dynamo graph, two compiled variants: the graph as it was, and the graph with sparse operators.

Which one runs is decided at every call from the densities of the parameters that come in; a variant is compiled when
it is first needed. Nothing recompiles when the topology or the sparsity changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from . import weights
from .errors import TopologyChangedError
from .kernels import cpu
from .lowering import crossover, tuning
from .passes.coverage import warn_unmatched
from .passes.linear import LinearPass, fake_index, value
from .weights import SparseWeight

CompileFn = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def find_weights(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, SparseWeight]:
    """Position of each input that is a sparse parameter -> its state."""
    found = {}
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    for i, (node, example) in enumerate(zip(placeholders, example_inputs, strict=False)):
        # Under DDP's graph splitting the example is fake; the graph argument still knows the Parameter.
        argument = node.meta.get("grapharg")
        with contextlib.suppress(Exception):
            example = argument.example if argument is not None else example
        weight = weights.of(example)
        if weight is not None:
            found[i] = weight
    return found


class Variants:
    """The callable that Dynamo runs in place of a graph that holds sparse parameters.

    Args:
        dense_threshold: the dense variant runs when the parameters' mean density is at least this; None: at the density
            where dense products become faster, see :mod:`mst_compile.lowering.crossover`.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        found: dict[int, SparseWeight],
        compile_fn: CompileFn,
        dense_threshold: float | None,
    ) -> None:
        self._compile_fn = compile_fn
        self._given_threshold = dense_threshold
        self._device = example_inputs[next(iter(found))].device.type
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        sparse = clone(graph_module)
        sources = {n: i for i, n in enumerate(n for n in sparse.graph.nodes if n.op == "placeholder") if i in found}
        # The mode of the graph's own fakes; detect_fake_mode() would return the tracing context's instead.
        mode = next((v.fake_mode for v in map(value, placeholders) if isinstance(v, FakeTensor)), None)
        linear = LinearPass(found, mode)
        slots = linear.run(sparse, sources)
        if self._device != "cpu" or cpu.available():  # else one warning has told already
            warn_unmatched([found[key] for key in linear.reasons if key not in slots])
        self._slots = [(i, found[i].signature) for i in slots]
        for weight in found.values():
            tuning.expect(weight.grid, weight.density_target)
        self._managed = list(found)
        self._found = found
        self._set_threshold()
        self._graphs = {False: graph_module, True: sparse}
        self._compiled: dict[bool, Callable[..., Any]] = {}
        self._context = torch._guards.TracingContext.try_get()
        self._compile_context = torch._guards.CompileContext.try_get()
        first = self._indices(example_inputs) is not None
        late = self._fakes(example_inputs)
        self._examples = list(example_inputs)
        self._compile(first)  # with Dynamo's own example inputs
        self._examples = late

    def __call__(self, *args: Any) -> Any:
        indices = self._indices(args)
        sparse = indices is not None
        run = self._compiled.get(sparse) or self._compile(sparse)
        out = run(*args, *indices) if indices is not None else run(*args)
        if torch.is_grad_enabled():
            self._guard_backward(args, out)
        return out

    def _indices(self, args: Sequence[Any]) -> list[Tensor] | None:
        """The index tensors of the parameters that came in, or None if the dense variant shall run."""
        if not self._slots:
            return None
        indices = []
        active = total = 0
        for i, signature in self._slots:
            parameter = args[i]
            weight = getattr(parameter, "_mst_weight", None)
            if weight is None and isinstance(parameter, FakeTensor):
                weight = self._found[i]  # DDP's first call
            # Another layer may share this graph: one that is not sparse, or on another grid, runs dense.
            if weight is None or weight.signature != signature:
                return None
            weight.coverage.served = True
            index = weight.index
            if index.device != parameter.device:
                weight.to_device(parameter.device)
                index = weight.index
            indices.append(index if not isinstance(parameter, FakeTensor) else fake_index(weight, parameter.fake_mode))
            active += weight.active
            total += weight.numel
        return indices if active < self._threshold * total else None

    def _guard_backward(self, args: Sequence[Any], out: Any) -> None:
        """Turn a topology change between this forward pass and its backward pass into a clear error."""
        outputs = out if isinstance(out, list | tuple) else (out,)
        node = next((o.grad_fn for o in outputs if isinstance(o, Tensor) and o.grad_fn is not None), None)
        if node is None:
            return
        used = [w for w in (getattr(args[i], "_mst_weight", None) for i in self._managed) if w is not None]
        before = [w.changes for w in used]

        def check(_: Any) -> None:
            if before != [w.changes for w in used]:
                changed = next(w.name for w, b in zip(used, before, strict=True) if w.changes != b)
                raise TopologyChangedError(
                    f"the topology of {changed} changed between the forward pass and this backward pass, so the "
                    "gradients would belong to another model. Call optimizer.step() or sparsifier(model).step() only "
                    "after backward(), and run the forward pass again"
                )

        node.register_prehook(check)

    def _set_threshold(self) -> None:
        """Look the crossover up: before compiling an estimate, after it what tuning measured."""
        grids = [self._found[i].grid for i, _ in self._slots]
        given = self._given_threshold
        self._threshold = crossover.of_weights(grids, self._device) if given is None else given

    def _compile(self, sparse: bool) -> Callable[..., Any]:
        graph_module = self._graphs.pop(sparse)
        examples = self._examples
        context = self._context
        if sparse:
            mode = context.fake_mode if context is not None else None
            examples = [*examples, *(fake_index(self._found[i], mode) for i, _ in self._slots)]
        with contextlib.ExitStack() as stack:
            if context is not None and torch._guards.TracingContext.try_get() is None:
                stack.enter_context(torch._guards.compile_context(self._compile_context))  # type: ignore[arg-type]
                stack.enter_context(torch._guards.tracing(context))
            self._compiled[sparse] = self._compile_fn(graph_module, examples)
        self._set_threshold()
        if not self._graphs or not self._slots:
            self._graphs, self._examples, self._context, self._compile_context = {}, [], None, None
        return self._compiled[sparse]

    def _fakes(self, example_inputs: Sequence[Any]) -> list[Any]:
        """Fake example inputs for a variant that is compiled later.

        Made now, because Dynamo forgets how it made its inputs symbolic once the backend returns: real tensors would
        then all become dynamic. Fakes also keep no batch alive.
        """
        context = self._context
        if context is None or context.fake_mode is None:
            return list(example_inputs)
        mode, out = context.fake_mode, []
        for x in example_inputs:
            if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
                symbolic = context.tensor_to_context.get(x, None)
                if symbolic is None:
                    x = mode.from_tensor(x, static_shapes=True)
                else:
                    x = mode.from_tensor(x, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)
            out.append(x)
        return out


def clone(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that keeps all that AOTAutograd and Inductor read off it."""
    new = fx.GraphModule(graph_module, fx.Graph())
    copies: dict[fx.Node, fx.Node] = {}
    output = new.graph.graph_copy(graph_module.graph, copies)
    if output is not None:
        new.graph.output(output)
    for old, copy in copies.items():
        if hasattr(old, "_dynamo_source"):
            copy._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    new.meta = dict(graph_module.meta)
    for name in ("_param_name_to_source", "_backend_id", "compile_subgraph_reason"):
        if hasattr(graph_module, name):
            setattr(new, name, getattr(graph_module, name))
    for name, child in graph_module.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(new, name, clone(child))
    new.recompile()
    return new
