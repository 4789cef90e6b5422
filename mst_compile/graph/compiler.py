"""Make the variants of one Dynamo graph: rewritten, with the inputs and in the context that Inductor asks for."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dynamo.callback import CallbackTrigger, callback_handler
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensor

from mst_compile.blocks.shards import behind
from mst_compile.graph import passes
from mst_compile.graph.attention.constant import Constant
from mst_compile.graph.context import Context, Product, Site
from mst_compile.graph.copies import clone
from mst_compile.graph.fx import placeholders, value
from mst_compile.graph.notes import note_attention, warn_unmatched
from mst_compile.graph.passes import Stage
from mst_compile.graph.served import fake_index, multiplied_alone, multiplied_inputs
from mst_compile.lowering import device
from mst_compile.lowering.compat import compile_session
from mst_compile.state import binding
from mst_compile.state.uses import note_multiplied
from mst_compile.state.weight import SparseWeight

_MANY_TOKENS = 1 << 16

CompileFn = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class Kind(NamedTuple):
    """Which variant of a graph: with sparse products, and with the pattern in its attention."""

    sparse: bool
    patterned: bool


@dataclass(frozen=True)
class Variant:
    """A compiled graph.

    Attributes:
        run: takes the graph's inputs, and the index tensors after them if products are sparse.
        constants: buffers whose values it relies on.
        shapes: of attentions with the pattern, see :class:`~mst_compile.graph.context.Site`.
    """

    run: Callable[..., Any]
    constants: Sequence[Constant] = ()
    shapes: Sequence[tuple[Any, ...]] = ()


def given_inputs(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """What the graph's inputs were when Dynamo traced it: under DDP's graph splitting the examples are fake, and only
    the graph's arguments still know the Parameters. Of what a rank holds of a DTensor, the DTensor."""
    given = []
    for node, example in zip(placeholders(graph_module.graph), example_inputs, strict=False):
        argument = node.meta.get("grapharg")
        with contextlib.suppress(Exception):
            example = argument.example if argument is not None else example
        given.append(behind(example))
    return given


def find_weights(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, SparseWeight]:
    """Position of each input that is a sparse parameter -> its state."""
    states = (binding.of(given) for given in given_inputs(graph_module, example_inputs))
    return {i: weight for i, weight in enumerate(states) if weight is not None}


def late_examples(tracing: torch._guards.TracingContext | None, example_inputs: Sequence[Any]) -> list[Any]:
    """Fake example inputs for a variant that is compiled after Dynamo has returned.

    Made now, because Dynamo forgets how it made its inputs symbolic once the backend returns: real tensors would then
    all become dynamic. Fakes also keep no batch alive.
    """
    if tracing is None or tracing.fake_mode is None:
        return list(example_inputs)
    mode, out = tracing.fake_mode, []
    for x in example_inputs:
        if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
            symbolic = tracing.tensor_to_context.get(x, None)
            if symbolic is None:
                x = mode.from_tensor(x, static_shapes=True)
            else:
                x = mode.from_tensor(x, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)
        out.append(x)
    return out


@contextlib.contextmanager
def compiling_late(
    tracing: torch._guards.TracingContext | None, compile_context: torch._guards.CompileContext | None
) -> Iterator[None]:
    """The contexts that Inductor asks for, as Dynamo left them; unless it is still at work.

    Whoever has asked Dynamo to be told of compilations is told of this one.
    """
    with contextlib.ExitStack() as stack:
        if torch._guards.TracingContext.try_get() is None:
            what = str(compile_context.compile_id if compile_context is not None else None)
            stack.enter_context(callback_handler.install_callbacks(CallbackTrigger.DYNAMO, what))
            stack.enter_context(compile_session())
            if tracing is not None:
                stack.enter_context(torch._guards.compile_context(compile_context))  # type: ignore[arg-type]
                stack.enter_context(torch._guards.tracing(_late(tracing)))
        yield


def _late(tracing: torch._guards.TracingContext) -> torch._guards.TracingContext:
    """Dynamo's context for a variant that is compiled after it has returned.

    A context of its own: what AOTAutograd notes of one variant must not replace what the backward pass of another,
    which is compiled when it first runs, will look up. Nor does a late variant belong to the buckets that DDP's graph
    splitting has counted.
    """
    own = copy.copy(tracing)
    own.fw_metadata = None
    own.ddp_optimizer_ctx = None
    return own


def _symbols(sizes: Iterable[Any]) -> set[Any]:
    """The symbols that sizes depend on."""
    return {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}


class Compiler:
    """Compiles variants of one graph when they are asked for, and forgets the graph when all exist.

    Threads wait for each other, under the lock that Dynamo compiles under.

    Args:
        found: position among the inputs -> state of the sparse parameter that came in there.
        choose: whether products of a variant with sparse ones may run dense where that is faster.
        first_call: the inputs of the first call, where ``example_inputs`` are fakes of another one's.

    Attributes:
        slots: positions of the sparse parameters, or of those that a part is of, whose index a variant with sparse
            products takes, in this order.
        products: the same -> the products with it that can be sparse.
        masked: positions of those of them whose gradients a variant with sparse products computes with zeros outside
            the active blocks.
        varying: positions of the inputs whose sizes say how many tokens are multiplied, where that may differ from
            call to call. A cache of keys and values that grows says nothing of it.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        found: Mapping[int, SparseWeight],
        compile_fn: CompileFn,
        choose: bool,
        first_call: Sequence[Any] | None = None,
    ) -> None:
        self._compile_fn = compile_fn
        self._found = found
        self._attention = found[next(iter(found))].attention
        record = device.of(example_inputs[next(iter(found))].device.type)
        self._context = Context(
            found,
            why_unsupported=lambda where, *operands: device.of(where).why_unsupported(*operands),
            why_no_attention=lambda where, *operands: device.of(where).why_no_attention(*operands),
            attention_pays=lambda where, *shape: device.of(where).attention_pays(*shape, torch.is_grad_enabled()),
            rounds_weights=lambda where: device.of(where).rounds_weights,
            choose=choose,
        )
        self._inputs = [value(n) for n in placeholders(graph_module.graph)]
        self._untouched = clone(graph_module)
        self._rewritten = passes.apply(passes.of(Stage.GRAPH), graph_module, self._context) > 0
        sparse = clone(graph_module)
        passes.apply(passes.of(Stage.PRODUCTS), sparse, self._context)
        self.slots = list(self._context.indices)
        self.products = self._context.products
        inputs = placeholders(sparse.graph)
        given = given_inputs(graph_module, example_inputs) if first_call is None else first_call
        multiplied = sorted(multiplied_inputs(sparse) - found.keys())
        note_multiplied(given[i] for i in multiplied if i < len(given) and isinstance(given[i], torch.nn.Parameter))
        keys = {slot.key for slot in self.slots}
        stacks = {i for i in keys if found[i].stacked}
        self.masked = sorted(multiplied_alone(sparse, {inputs[i]: i for i in keys}, stacks) - self._context.cut)
        tokens = _symbols(size for products in self.products.values() for p in products for size in p.shape[:-1])
        sizes = [x.shape if isinstance(x, Tensor) else [x] for x in self._inputs]
        self.varying = [i for i, own in enumerate(sizes) if _symbols(own) & tokens]
        self._note_weights(warn=record.why_not_compiled() is None)  # else one warning has told already
        # Attention is rewritten when a variant with it is compiled: both graphs may be needed with either pattern.
        self._graphs = {False: graph_module, True: sparse}
        self._made: dict[Kind, Variant] = {}
        self._baseline: Variant | None = None
        self._tracing = torch._guards.TracingContext.try_get()
        self._compile_context = torch._guards.CompileContext.try_get()
        self._examples = list(example_inputs)  # Dynamo's own for the first variant
        self._late_examples = late_examples(self._tracing, example_inputs)

    def variant(self, kind: Kind, inputs: Sequence[Any]) -> Variant:
        """The variant of a kind; ``inputs`` are those of the call that needs it."""
        with compile_lock:
            return self._made[kind] if kind in self._made else self._make(kind, inputs)

    def _make(self, kind: Kind, inputs: Sequence[Any]) -> Variant:
        graph_module = clone(self._graphs[kind.sparse])
        constants, sites = self._give_pattern(graph_module, inputs) if kind.patterned else ([], [])
        shapes = [site.shape for site in sites if site.replaced]
        plain = kind._replace(patterned=False)
        if not kind.patterned:
            self._make_attention_fast(graph_module, inputs)
        if kind.patterned and not shapes:  # no attention here that could be sparse
            self._made[kind] = self.variant(plain, inputs)
        else:
            self._made[kind] = Variant(self._compile(graph_module, kind.sparse), constants, shapes)
        self._forget_what_no_variant_needs()
        return self._made[kind]

    def baseline(self, inputs: Sequence[Any]) -> Variant:
        """What would run if nothing were sparse: the graph as Dynamo handed it over. It is the dense variant where no
        pass has rewritten that.
        """
        with compile_lock:
            if self._baseline is None:
                dense = Kind(False, False)
                if self._rewritten or self._make_attention_fast(clone(self._graphs[False]), inputs):
                    self._baseline = Variant(self._compile(clone(self._untouched), False))
                else:
                    self._baseline = self.variant(dense, inputs)
                self._forget_what_no_variant_needs()
            return self._baseline

    def is_dense_variant(self, variant: Variant) -> bool:
        """Whether it is the one with dense products and full attention."""
        return variant is self._made.get(Kind(False, False))

    def _make_attention_fast(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> bool:
        """Let full attention run on the device's kernel where that is faster; returns whether any does."""
        if not self._context.choose:
            return False
        return passes.apply(passes.of(Stage.FULL), graph_module, replace(self._context, inputs=inputs)) > 0

    def sizes(self, shape: tuple[Any, ...], args: Sequence[Any]) -> tuple[int, ...]:
        """A shape in the graph, symbolic where Dynamo made it so, as it is in the call with ``args``."""
        return tuple(int(size) for size in self._numbers(shape, args))

    def tokens(self, product: Product, args: Sequence[Any]) -> int:
        """How many tokens a product multiplies in the call with ``args``; many, if they depend on values."""
        tokens = math.prod(self._numbers(product.shape[:-1], args))
        return int(tokens) if not getattr(tokens, "free_symbols", None) else _MANY_TOKENS

    def _numbers(self, shape: tuple[Any, ...], args: Sequence[Any]) -> tuple[Any, ...]:
        """A shape with the sizes of ``args`` in it; what depends on values stays symbolic."""
        symbolic = next((size for size in shape if isinstance(size, torch.SymInt)), None)
        if symbolic is None:
            return shape
        inputs = [x if isinstance(x, Tensor | torch.SymInt) else None for x in self._inputs]
        # At the first call numbers are symbols; asking one for its value would make it a constant of the graph.
        given = [x.node.hint if isinstance(x, torch.SymInt) else x for x in args]
        environment: Any = symbolic.node.shape_env
        bound = environment.bind_symbols(inputs, given)
        return tuple(s.node.expr.xreplace(bound) if isinstance(s, torch.SymInt) else s for s in shape)

    def _note_weights(self, warn: bool) -> None:
        """Tell the weights what became of their products."""
        said = self._context
        for key, weight in self._found.items():
            weight.uses.note(said.matched.get(key, ()), said.unmatched.get(key, ()))
        if warn:
            served = {slot.key for slot in self.slots}
            warn_unmatched([self._found[key] for key in said.unmatched if key not in served])

    def _give_pattern(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[list[Constant], list[Site]]:
        """Give every attention that the pass understands its pattern."""
        state = self._attention
        context = replace(self._context, pattern=state.parts, inputs=inputs, sites=[], constants=[])
        passes.apply(passes.of(Stage.PATTERN), graph_module, context)
        note_attention(state, context.sites)
        return context.constants, context.sites

    def _compile(self, graph_module: fx.GraphModule, sparse: bool) -> Callable[..., Any]:
        tracing, examples = self._tracing, self._examples
        if sparse:
            mode = tracing.fake_mode if tracing is not None else None
            examples = [*examples, *(fake_index(self._found[i], part, mode) for i, part in self.slots)]
        with compiling_late(tracing, self._compile_context):
            run = self._compile_fn(graph_module, examples)
        self._examples = self._late_examples
        return run

    def _forget_what_no_variant_needs(self) -> None:
        products = (False, True) if self.slots else (False,)
        patterns = (False, True) if self._attention.sparse != "full" else (False,)
        kinds = {Kind(sparse, patterned) for sparse in products for patterned in patterns}
        if self._baseline is not None and kinds <= self._made.keys():
            del self._untouched
            self._graphs, self._examples, self._late_examples = {}, [], []
            self._tracing = self._compile_context = None
