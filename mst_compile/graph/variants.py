"""One Dynamo graph, a few compiled variants: with dense or sparse products, with full or sparse attention.

Which one runs is decided at every call, from the densities of the parameters that come in and from the attention
pattern of the moment; a variant is compiled when it is first needed. Nothing recompiles when topology, sparsity or
attention change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from mst_compile.errors import TopologyChangedError
from mst_compile.graph.attention.evaluate import Constant
from mst_compile.graph.attention.sites import AttentionPass
from mst_compile.graph.linear import LinearPass, fake_index, value
from mst_compile.graph.notes import note_attention, warn_unmatched
from mst_compile.kernels import cpu
from mst_compile.lowering import crossover, support, tuning
from mst_compile.state import weight as weights
from mst_compile.state.weight import SparseWeight

Kind = tuple[bool, str]  # whether products are sparse, and the attention pattern
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
        self._attention = found[next(iter(found))].attention
        self._mode = mode
        # Attention is rewritten when a variant with it is compiled: both graphs may be needed with either pattern.
        self._graphs = {False: graph_module, True: sparse}
        self._compiled: dict[Kind, Callable[..., Any]] = {}
        self._context = torch._guards.TracingContext.try_get()
        self._compile_context = torch._guards.CompileContext.try_get()
        # Masks in buffers that variants with sparse attention rely on, by their kind.
        self._constants: dict[Kind, list[Constant]] = {}
        self._queries: dict[Kind, list[tuple[Any, ...]]] = {}  # shapes in attentions that have a pattern
        self._inputs = [value(n) for n in placeholders]
        indices = self._indices(example_inputs)
        first = indices is not None, self._pattern(example_inputs)
        late = self._fakes(example_inputs)
        self._examples = list(example_inputs)
        self._compile(first, [*example_inputs, *(indices or [])])  # with Dynamo's own example inputs
        self._examples = late

    def __call__(self, *args: Any) -> Any:
        indices = self._indices(args)
        kind = indices is not None, self._pattern(args)
        inputs = args if indices is None else (*args, *indices)
        run = self._compiled.get(kind) or self._compile(kind, inputs)
        if not all(constant.holds(args[constant.position]) for constant in self._constants.get(kind, ())):
            kind = kind[0], "full"  # another mask than the one that was found causal
            run = self._compiled.get(kind) or self._compile(kind, inputs)
        out = run(*inputs)
        if torch.is_grad_enabled():
            self._guard_backward(args, out)
            self._note_queries(args, kind)
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
            weight.uses.served = True
            index = weight.index
            if index.device != parameter.device:
                weight.to_device(parameter.device)
                index = weight.index
            indices.append(index if not isinstance(parameter, FakeTensor) else fake_index(weight, parameter.fake_mode))
            active += weight.active
            total += weight.numel
        return indices if active < self._threshold * total else None

    def _pattern(self, args: Sequence[Any]) -> str:
        """The attention pattern of the model that is running: another may share this graph."""
        parameter = args[self._managed[0]]
        weight = getattr(parameter, "_mst_weight", None)
        if isinstance(parameter, FakeTensor):
            return self._attention.pattern  # DDP's first call
        if weight is None or weight.attention.parts != self._attention.parts or weight.attention.pattern == "full":
            return "full"
        return self._attention.sparse

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

    def _note_queries(self, args: Sequence[Any], kind: Kind) -> None:
        """Note the attentions of this pass that have a pattern, if someone counts."""
        weight = getattr(args[self._managed[0]], "_mst_weight", None)
        if weight is not None and weight.attention.queries is not None:
            weight.attention.queries += [self._sizes(query, args) for query in self._queries.get(kind, ())]

    def _sizes(self, shape: tuple[Any, ...], args: Sequence[Any]) -> tuple[int, ...]:
        """A shape in the graph, symbolic where Dynamo made it so, as it is in the call with ``args``."""
        symbolic = next((size for size in shape if isinstance(size, torch.SymInt)), None)
        if symbolic is None:
            return shape
        inputs = [x if isinstance(x, Tensor | torch.SymInt) else None for x in self._inputs]
        bound = symbolic.node.shape_env.bind_symbols(inputs, args)
        return tuple(int(s.node.expr.xreplace(bound)) if isinstance(s, torch.SymInt) else s for s in shape)

    def _set_threshold(self) -> None:
        """Look the crossover up: before compiling an estimate, after it what tuning measured."""
        grids = [self._found[i].grid for i, _ in self._slots]
        given = self._given_threshold
        self._threshold = crossover.of_weights(grids, self._device) if given is None else given

    def _compile(self, kind: Kind, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a variant; ``inputs`` are those of the call that needs it."""
        sparse, pattern = kind
        graph_module = clone(self._graphs[sparse])
        if not self._rewrite_attention(graph_module, kind, inputs):
            pattern = "full"
            if (sparse, pattern) in self._compiled:  # no attention here that could be sparse
                self._compiled[kind] = self._compiled[sparse, pattern]
                return self._compiled[kind]
        examples = self._examples
        context = self._context
        if sparse:
            mode = context.fake_mode if context is not None else None
            examples = [*examples, *(fake_index(self._found[i], mode) for i, _ in self._slots)]
        with contextlib.ExitStack() as stack:
            if context is not None and torch._guards.TracingContext.try_get() is None:
                stack.enter_context(torch._guards.compile_context(self._compile_context))  # type: ignore[arg-type]
                stack.enter_context(torch._guards.tracing(context))
            self._compiled[sparse, pattern] = self._compiled[kind] = self._compile_fn(graph_module, examples)
        self._set_threshold()
        self._forget_what_no_variant_needs()
        return self._compiled[kind]

    def _rewrite_attention(self, graph_module: fx.GraphModule, kind: Kind, inputs: Sequence[Any]) -> bool:
        """Give every attention that the pass understands its pattern; returns whether any changed."""
        state, pattern = self._attention, kind[1]
        if pattern == "full":
            return False
        attention = AttentionPass(state.parts, self._mode, why_unsupported=support.why_no_attention)
        sites = attention.run(graph_module, inputs)
        self._constants[kind] = attention.constants
        self._queries[kind] = [site.query for site in sites if site.replaced]
        note_attention(state, sites)
        return any(site.replaced for site in sites)

    def _forget_what_no_variant_needs(self) -> None:
        patterns = {"full", self._attention.sparse}
        kinds = {(sparse, pattern) for sparse in ((False, True) if self._slots else (False,)) for pattern in patterns}
        if kinds <= self._compiled.keys():
            self._graphs, self._examples, self._context, self._compile_context = {}, [], None, None

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
