"""The vocabulary of all graph passes: what a node is, what it computes, where it stands, and how to add another.

The passes work on the graphs that Dynamo hands over. Operators appear there in many guises (functions, methods,
operators of Python); the tables below say once which of them are the same. Results are known as fake tensors.
"""

from __future__ import annotations

import contextlib
import operator
import string
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import networkx
import torch
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# ---- operators -------------------------------------------------------------------------------------------------------

# What a node calls: functions as they are, methods by name.
LINEARS = {torch.nn.functional.linear, torch._C._nn.linear}
PRODUCTS = {torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm", "__matmul__"}
EINSUMS = {torch.einsum, torch.functional.einsum}
SOFTMAXES = {torch.softmax, torch.nn.functional.softmax, "softmax"}
DROPOUTS = {torch.dropout, torch.nn.functional.dropout}
LINEAR = torch._C._nn.linear
ATTENTION = torch._C._nn.scaled_dot_product_attention
MULTIHEAD = torch.nn.functional.multi_head_attention_forward
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_SWAPS = {torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"}
_PERMUTES = {torch.permute, "permute"}
# Attributes are read with getattr up to torch 2.13, and are operators, with or without an overload, from 2.14 on.
_aten = torch.ops.aten
_OF_MATRICES = {torch.t, "t", "T", "H", _aten.t, _aten.numpy_T, _aten.matrix_H}
UNBINDS = {torch.unbind, "unbind"}
_SELECTS = {torch.select, "select"}
_OF_LAST = {torch.adjoint, "adjoint", "mT", "mH", _aten.mT, _aten.mH, _aten.adjoint}
_CONJUGATE = {torch.adjoint, "adjoint", "H", "mH", _aten.matrix_H, _aten.mH, _aten.adjoint}

# By the name of either.
CASTS = {"to", "float", "type", "type_as", "bfloat16", "half", "double", "contiguous", "clone"}
RESHAPES = {"view", "reshape", "unflatten", "flatten"}
POINTWISE = {
    "add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "div_", "truediv", "itruediv",
    "true_divide", "neg", "where", "masked_fill", "masked_fill_", "maximum", "minimum", "clamp", "tanh", "abs", "pow",
    "relu", "exp",
}  # fmt: skip

_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
}  # fmt: skip
_RECORD = torch._C._set_grad_enabled
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_STACKS = ("nn_module_stack", "source_fn_stack", "stack_trace")


def computes(node: fx.Node) -> bool:
    """Whether a node is the call of a function or method."""
    return node.op in ("call_function", "call_method")


def calls(node: fx.Node, targets: Collection[Any]) -> bool:
    """Whether a node is the call of one of these functions or methods."""
    return computes(node) and node.target in targets


def name(node: fx.Node) -> str:
    """What a node calls: ``"matmul"`` for the function as for the method."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """A node's arguments by name; ``names`` are those of positional ones."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def einsum_of_two(node: fx.Node, at: int, weight_at: int) -> tuple[str, str, str] | None:
    """The letters of an einsum's input, weight and result, of which the first two are its arguments ``at`` and
    ``weight_at``; None if it is none of two operands. An ellipsis is as many letters as it has dimensions. Where it
    does not say its result, that has the letters that occur once, in the order of the alphabet, behind an ellipsis."""
    if not calls(node, EINSUMS) or len(node.args) != 3 or not isinstance(node.args[0], str):
        return None
    operands, said, out = node.args[0].replace(" ", "").partition("->")
    first, _, second = operands.partition(",")
    dims = [value(operand).dim() if isinstance(value(operand), Tensor) else -1 for operand in node.args[1:]]
    more = [n - len(letters.replace("...", "")) for n, letters in zip(dims, (first, second), strict=True)]
    if "," in second or any(n < 0 or (n and "..." not in x) for n, x in zip(more, (first, second), strict=True)):
        return None
    if not said:
        out = "..." + "".join(sorted(c for c in operands if c not in ",." and operands.count(c) == 1))
    free = "".join(c for c in string.ascii_letters if c not in node.args[0])[: max(more)]
    first, second = (x.replace("...", free[len(free) - n :]) for x, n in zip((first, second), more, strict=True))
    out = out.replace("...", free)
    x, w = (first, second) if at < weight_at else (second, first)
    return (x, w, out) if x and w and out else None


# ---- values ----------------------------------------------------------------------------------------------------------


def value(node: Any) -> Any:
    """The fake result that Dynamo recorded for a node; None within a transform of torch.func, whose tensors stand for
    others that can be computed with while it is traced alone."""
    found = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return None if isinstance(found, Tensor) and is_functorch_wrapped_tensor(found) else found


def fake_mode(graph: fx.Graph) -> Any:
    """The mode of the graph's own fakes, or None; ``detect_fake_mode()`` would return the tracing context's."""
    return next((mode for node in graph.nodes if (mode := _mode_of(value(node))) is not None), None)


def _mode_of(tensor: Any) -> Any:
    """The mode of a fake tensor, or of the fakes in a wrapper such as a DTensor: a graph may hold no others."""
    if isinstance(tensor, FakeTensor):
        return tensor.fake_mode
    inside = tensor.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(tensor) else ()
    return next((mode for name in inside if (mode := _mode_of(getattr(tensor, name))) is not None), None)


def constant(item: Any) -> float | None:
    """A number, or the one that a node holds, if it is the same at every call; asks no guard."""
    found = value(item) if isinstance(item, fx.Node) else item
    if isinstance(found, torch.SymInt | torch.SymFloat):
        return float(found.node.expr) if found.node.expr.is_number else None
    return found if isinstance(found, int | float) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for all values of symbolic ones; asks no guard."""
    expressions = [x.node.expr if isinstance(x, torch.SymInt) else x for x in (a, b)]
    return bool(expressions[0] == expressions[1])


def storage(node: Any) -> int | None:
    """What identifies the memory of a node's fake tensor; views share it."""
    tensor = value(node)
    if not isinstance(tensor, Tensor):
        return None
    try:
        return tensor.untyped_storage()._cdata
    except Exception:
        return None  # a tensor subclass without memory of its own


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors an operation writes to: in place, as ``out``, or as its schema says."""
    if not computes(node):
        return []
    if isinstance(node.target, OpOverload):
        own = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        given = arguments(node, *(a.name for a in node.target._schema.arguments))
        return _nodes([given.get(argument) for argument in own])
    if isinstance(node.target, HigherOrderOperator):
        return node.all_input_nodes if _has_writing_body(node) else []
    called, found = name(node), [node.kwargs.get("out")]
    in_place = (called.endswith("_") and not called.endswith("__")) or called.startswith("__i")
    if in_place or called == "__setitem__" or node.target in _IN_PLACE or node.kwargs.get("inplace") is True:
        found += [*node.args[:1], *(node.args if called.startswith("_fused") else ())]
    return _nodes(found)


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return found


def _has_writing_body(node: fx.Node) -> bool:
    """Whether an operator with bodies, like a checkpoint, writes to what it is given."""
    if "mutation" in str(node.target):
        return True  # kernels of the user's
    bodies = [
        getattr(node.graph.owning_module, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"
    ]
    graphs = [body.graph for body in bodies if isinstance(body, fx.GraphModule)]
    given = {storage(n) for graph in graphs for n in placeholders(graph)} - {None}
    return any(storage(n) in given for graph in graphs for writer in graph.nodes for n in written(writer))


def before_cast(node: Any) -> fx.Node | None:
    """The node of which ``node`` is a copy in perhaps another dtype or layout, or None if it is something else."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target not in CASTS:
        return None
    source = node.args[0]
    new, old = value(node), value(source)
    if not (isinstance(new, Tensor) and isinstance(old, Tensor)) or new.device != old.device:
        return None
    if any(node in written(user) for user in node.users):
        return None  # a copy that changes afterwards
    return source  # type: ignore[return-value]


def before_local(node: Any) -> fx.Node | None:
    """The node of a DTensor of which ``node`` is what this rank holds, or None if it is something else."""
    # With arguments, older versions of Dynamo call a function of their own.
    if not isinstance(node, fx.Node) or not computes(node) or name(node) not in ("to_local", "prim_to_local"):
        return None
    return node.args[0]  # type: ignore[return-value]


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of ``narrow`` is one of ``wide``: a cast to ``wide`` then changes no value."""
    return torch.promote_types(wide, narrow) == wide


def is_one_cast(dtypes: Sequence[torch.dtype]) -> bool:
    """Whether numbers of the first dtype that are cast to the others in turn become what a cast to the last one alone
    makes of them."""
    rounds = next((i for i, dtype in enumerate(dtypes) if not holds(dtype, dtypes[0])), len(dtypes))
    return all(dtype == dtypes[-1] for dtype in dtypes[rounds:])


def is_recorded(node: fx.Node) -> bool:
    """Whether gradients are recorded where a node stands: within no ``torch.no_grad()`` of the graph, or around it.

    Within the body of a checkpoint what stands around its call is not known, and taken to be as around the graph.
    """
    switches = [n for n in node.graph.find_nodes(op="call_function", target=_RECORD) if n < node]
    return bool(switches[-1].args[0]) if switches else torch.is_grad_enabled()


def keeps_gradient(node: Any, source: Any, reader: fx.Node) -> bool:
    """Whether what ``reader`` does with ``node`` can be done with ``source``, which ``node`` was made of, step by step
    by its first argument: no gradient would then reach ``source`` that does not now."""
    if not value(source).requires_grad or not is_recorded(reader):
        return True
    while node is not source:
        # A view of a parameter says to require gradients even where it was made without recording any; what unbind
        # returns is no tensor.
        if not (getattr(value(node), "requires_grad", True) and is_recorded(node)):
            return False
        node = node.args[0]
    return True


def before_swap(node: Any) -> fx.Node | None:
    """The node whose last two dimensions ``node`` exchanges, or None if it does something else."""
    if not isinstance(node, fx.Node) or not computes(node) or not node.args:
        return None
    source, rest = node.args[0], node.args[1:]
    tensor = value(source)
    if not isinstance(tensor, Tensor) or tensor.dim() < 2:
        return None
    dims = tensor.dim()
    if calls(node, _SWAPS | _PERMUTES):
        given = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
        order = [d % dims for d in given if isinstance(d, int)]  # type: ignore[union-attr]
        last = [dims - 2, dims - 1]
        swaps = order == [*range(dims - 2), *last[::-1]] if node.target in _PERMUTES else sorted(order) == last
    else:
        what = rest[0] if node.target is getattr else getattr(node.target, "overloadpacket", node.target)
        swaps = what in _OF_LAST or (what in _OF_MATRICES and dims == 2)
        swaps = swaps and not (what in _CONJUGATE and tensor.is_complex())
    return source if swaps else None  # type: ignore[return-value]


def before_selection(node: Any) -> tuple[fx.Node | None, int]:
    """The node of which ``node`` is one entry along the first dimension, and which one; None if it is something else,
    or which one a tensor says."""
    if not isinstance(node, fx.Node) or not computes(node) or not node.args:
        return None, 0
    source, at = node.args[0], node.args[-1]
    if node.target is operator.getitem and isinstance(source, fx.Node) and calls(source, UNBINDS):
        source = source.args[0] if arguments(source, "input", "dim").get("dim", 0) == 0 else None
    elif calls(node, _SELECTS):
        source = source if len(node.args) == 3 and node.args[1] == 0 else None
    elif node.target is not operator.getitem:
        return None, 0
    tensor = value(source)
    if type(at) is not int or not isinstance(tensor, Tensor) or type(tensor.shape[0]) is not int:
        return None, 0
    return source, at % tensor.shape[0]  # type: ignore[return-value]


# ---- places ----------------------------------------------------------------------------------------------------------


def where(node: fx.Node) -> str:
    """Path of the module that a node stands in, or the empty string."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def describe(node: fx.Node) -> str:
    """A short name of what ``node`` computes, with the module it stands in."""
    return f"{name(node)} in {where(node)}" if where(node) else name(node)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def add_placeholder(graph: fx.Graph, called: str, example: Any) -> fx.Node:
    """One more input, after all others."""
    with graph.inserting_after(placeholders(graph)[-1]):
        node = graph.placeholder(called)
    node.meta["example_value"] = example
    return node


class Region:
    """Dynamo's graph, or the body of an activation checkpoint in it.

    Attributes:
        module, graph: what holds the nodes.
        outer: the region that calls this one; None for Dynamo's own graph.
        sources: placeholder of a body -> the node of ``outer`` that it stands for.
    """

    def __init__(self, module: fx.GraphModule, outer: Region | None = None, call: fx.Node | None = None) -> None:
        self.module, self.graph = module, module.graph
        self.outer, self._call = outer, call
        given: Any = () if call is None else call.args[1:]
        pairs = zip(placeholders(self.graph), given, strict=False)
        self.sources: dict[fx.Node, fx.Node] = {inside: o for inside, o in pairs if isinstance(o, fx.Node)}

    def origin(self, node: Any) -> Any:
        """The node of the outermost graph that a body's placeholder stands for; others are their own."""
        if self.outer is None or node not in self.sources:
            return node
        return self.outer.origin(self.sources[node])

    def receive(self, node: fx.Node) -> fx.Node:
        """A node of this graph, or of one around it, as a node of this one; bodies get one more input."""
        if node.graph is self.graph or self.outer is None or self._call is None:
            return node
        outside = self.outer.receive(node)
        for inside, source in self.sources.items():
            if source is outside:
                return inside
        inside = add_placeholder(self.graph, f"mst_{outside.name}", value(outside))
        self.sources[inside] = outside
        self._call.args = (*self._call.args, outside)
        return inside


def walk(graph_module: fx.GraphModule) -> Iterator[tuple[Region, fx.Node]]:
    """All nodes in the order in which they run, those of checkpoints' bodies where these are called.

    Nodes may be added and erased meanwhile; added ones are not visited.
    """
    yield from _walk(Region(graph_module))


def _walk(region: Region) -> Iterator[tuple[Region, fx.Node]]:
    for node in list(region.graph.nodes):
        if calls(node, {CHECKPOINT}):
            body = getattr(region.module, str(node.args[0].target))  # type: ignore[union-attr]
            yield from _walk(Region(body, region, node))
        elif not node._erased:
            yield region, node


def between(graph: fx.Graph, start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """The nodes on all ways from ``start`` to ``end``, without the two."""
    flow = networkx.DiGraph()
    flow.add_nodes_from((start, end))
    inside = False
    for node in graph.nodes:
        inside = inside or node is start
        if inside:
            flow.add_edges_from((node, user) for user in node.users)
        if node is end:
            break
    return networkx.descendants(flow, start) & networkx.ancestors(flow, end)


# ---- new nodes -------------------------------------------------------------------------------------------------------


class Emitter:
    """Adds nodes in front of one node, each with the fake result that later passes and AOTAutograd's cache ask for."""

    def __init__(self, node: fx.Node) -> None:
        self._graph, self._node = node.graph, node
        self._mode = fake_mode(node.graph)
        self._autocast = _open_regions(node)

    def __call__(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._node):
            if isinstance(target, str):
                new = self._graph.call_method(target, args, kwargs)
            else:
                new = self._graph.call_function(target, args, kwargs)
        values, named = fx.node.map_arg(args, value), fx.node.map_arg(kwargs, value)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._mode or contextlib.nullcontext())
            # As Dynamo does: what is made of other operators turns symbolic sizes into numbers in C++, in Python not.
            stack.enter_context(enable_python_dispatcher())
            stack.enter_context(torch.no_grad())
            for device, dtype, enabled, cache in self._autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
            function = getattr(values[0], target) if isinstance(target, str) else target
            new.meta["example_value"] = function(*(values[1:] if isinstance(target, str) else values), **named)
        for key in _STACKS:
            if key in self._node.meta:
                new.meta[key] = self._node.meta[key]
        return new


def _open_regions(node: fx.Node) -> list[tuple[Any, ...]]:
    """The autocast regions of the graph that a node stands in: they decide on the dtype of results."""
    regions: dict[fx.Node, tuple[Any, ...]] = {}
    for n in node.graph.nodes:
        if n is node:
            break
        if n.target is _ENTER:
            regions[n] = n.args
        elif n.target is _EXIT:
            regions.pop(n.args[0], None)  # type: ignore[arg-type]
    return list(regions.values())


# ---- graphs ----------------------------------------------------------------------------------------------------------
