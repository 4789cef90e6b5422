"""Find products with sparse weights in a Dynamo graph and rewrite them to ``mst::linear``.

The pass works on the graph that Dynamo hands to a backend, before AOTAutograd: there parameters are still inputs
that can be recognised, and ``einsum``, ``matmul`` and ``addmm`` still have their form. The packed index of each weight
enters as a placeholder after all others, so that a topology change is new data, never a new graph.

A linear layer that is written in a new way needs a function in :data:`FORMS`, and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mst_compile.blocks.shards import is_sharded
from mst_compile.graph import spread
from mst_compile.graph.context import Context, Product
from mst_compile.graph.fx import (
    CHECKPOINT,
    EINSUMS,
    LINEARS,
    PRODUCTS,
    Emitter,
    Region,
    add_placeholder,
    arguments,
    before_cast,
    before_local,
    before_swap,
    calls,
    describe,
    fake_mode,
    holds,
    is_one_cast,
    keeps_gradient,
    name,
    placeholders,
    same_size,
    storage,
    value,
    walk,
    written,
)
from mst_compile.state.weight import SparseWeight


@dataclass
class Match:
    """``y = x @ W + bias``; ``weight`` leads to the parameter, ``rows_are_out`` if it enters as ``[out, in]``, and
    ``on_left`` if it stands in front, ``y = W @ x``, so that tokens are the last dimension and features that before it.
    """

    x: Any
    weight: Any
    rows_are_out: bool
    bias: Any = None
    on_left: bool = False


# ---- forms -----------------------------------------------------------------------------------------------------------


def _linear(node: fx.Node) -> Match | None:
    if not calls(node, LINEARS):
        return None
    given = arguments(node, "input", "weight", "bias")
    return Match(given["input"], given["weight"], True, given.get("bias"))


def _addmm(node: fx.Node) -> Match | None:
    if not calls(node, {torch.addmm}) or node.kwargs or len(node.args) != 3:
        return None
    bias, x, weight = node.args
    return Match(x, weight, False, bias)


def _product(node: fx.Node) -> Match | None:
    if not calls(node, PRODUCTS) or node.kwargs or len(node.args) != 2:
        return None
    return Match(node.args[0], node.args[1], False)


def _product_from_left(node: fx.Node) -> Match | None:
    """``W @ x``, as layers of state-space models write it whose tokens come last."""
    if not calls(node, PRODUCTS) or node.kwargs or len(node.args) != 2:
        return None
    weight, x = node.args
    found = value(x)
    return Match(x, weight, True, on_left=not isinstance(found, torch.Tensor) or found.dim() > 1)


def _einsum(node: fx.Node) -> Match | None:
    """``...k,nk->...n`` and ``...k,kn->...n``, whatever the letters."""
    return _summed(node, 1, 2)


def _einsum_from_left(node: fx.Node) -> Match | None:
    """``nk,...k->...n`` and ``kn,...k->...n``."""
    return _summed(node, 2, 1)


def _summed(node: fx.Node, at: int, weight_at: int) -> Match | None:
    """An einsum of an input and a weight, which are the arguments ``at`` and ``weight_at``."""
    if not calls(node, EINSUMS) or len(node.args) != 3 or not isinstance(node.args[0], str):
        return None
    operands, _, out = node.args[0].replace(" ", "").partition("->")
    x, _, w = operands.partition(",") if at < weight_at else operands.rpartition(",")[::-1]
    if not out or len(w) != 2 or not x or x[-1] not in w or len(set(x.replace("...", ""))) != len(x.replace("...", "")):
        return None
    reduced = x[-1]
    feature = w.replace(reduced, "")
    if len(feature) != 1 or feature in x or out != x[:-1] + feature:
        return None
    return Match(node.args[at], node.args[weight_at], w[1] == reduced)


FORMS: list[Callable[[fx.Node], Match | None]] = [
    _linear, _addmm, _product, _einsum, _product_from_left, _einsum_from_left,
]  # fmt: skip
"""The ways to write a linear layer. Each looks at one node and says what product it computes, or None."""


def matches(node: fx.Node) -> Iterator[Match]:
    """The products that ``node`` may compute by its form: which of two operands is the weight it does not say."""
    return (found for found in (form(node) for form in FORMS) if found is not None)


# What may use a weight that is served. In backward passes, as compiled autograd hands them over, are the products of
# graphs that were compiled before, and gradients are added up.
SERVED = {torch.ops.mst.linear.default, torch.ops.mst.linear_grad_input.default, spread.linear, CHECKPOINT}
_ACCUMULATE = "AccumulateGrad"
_ROUNDS = "mst_rounds"  # in the meta of what makes a weight's copy in the activations' dtype


# ---- the pass --------------------------------------------------------------------------------------------------------


def run(graph_module: fx.GraphModule, context: Context) -> int:
    """Rewrite products with sparse weights in place; returns how many."""
    inputs = placeholders(graph_module.graph)
    rewrite = _Rewrite({inputs[i]: i for i in context.weights}, context, fake_mode(graph_module.graph))
    for region, node in walk(graph_module):
        rewrite.visit(region, node)
    rewrite.report(graph_module)
    return sum(map(len, context.matched.values()))


class _Rewrite:
    """One run of the pass: ``keys`` maps the placeholder of a sparse parameter to its key in the context."""

    def __init__(self, keys: dict[fx.Node, int], context: Context, mode: Any) -> None:
        self._keys, self._context, self._mode = keys, context, mode
        self._indices: dict[int, fx.Node] = {}
        self._rounded: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}  # weight, dtype -> its copy
        self._writers: dict[int | None, fx.Node] = {}  # memory that nodes so far have written to -> the last

    def visit(self, region: Region, node: fx.Node) -> None:
        self._note_writes(region, node)
        for found in matches(node):
            way, flipped = _way_from_source(found.weight)
            whole = before_local(way[0])  # of a DTensor products may be written with this rank's part
            key = self._keys.get(region.origin(whole or way[0]))
            if key is not None:
                self._serve(region, node, found, way, flipped, key)
                return

    def _serve(self, region: Region, node: fx.Node, found: Match, way: list[Any], flipped: bool, key: int) -> None:
        """Rewrite a product with the weight of ``key``, or note why it stays dense."""
        base, whole = way[0], before_local(way[0])
        transposed = found.rows_are_out == flipped
        reason = self._why_not(node, found, way, self._context.weights[key], transposed)
        held = way if whole is None else [whole, *way]
        writer = next((self._writers[m] for n in held if (m := storage(region.origin(n))) in self._writers), None)
        if writer is not None:  # here too, before the product: what a weight holds is looked at before the graph runs
            reason = f"{describe(node)}: its values are changed before by {describe(writer)}"
        if reason is not None:
            self._context.unmatched.setdefault(key, []).append(reason)
            return
        index = region.receive(self._index(region, key))
        self._replace(node, found, base, index, key, transposed)
        self._context.matched.setdefault(key, []).append(node.meta.get("stack_trace") or "")

    def _note_writes(self, region: Region, node: fx.Node) -> None:
        """Remember what memory a node writes to, outside of its checkpoint too."""
        memory = {storage(n) for n in written(node)} - {None}
        while region.outer is not None and memory:
            memory |= {storage(outside) for inside, outside in region.sources.items() if storage(inside) in memory}
            region = region.outer
        self._writers |= dict.fromkeys(memory - {None}, node)

    def _why_not(
        self, node: fx.Node, found: Match, way: list[Any], weight: SparseWeight, transposed: bool
    ) -> str | None:
        out, x, w = value(node), value(found.x), value(way[0])
        if not all(isinstance(v, torch.Tensor) for v in (out, x, w)):
            return f"{describe(node)}: its tensors are unknown, or within a transform of torch.func"
        if x.is_nested:
            return f"{describe(node)}: its input is a nested tensor"
        if not same_size(x.shape[-2 if found.on_left else -1], w.shape[0 if transposed else 1]):
            return f"{describe(node)}: its input has one feature, broadcast to all of the weight's"
        stops = next((n for n in way if not keeps_gradient(n, way[0], node)), None)
        if stops is not None:
            return f"{describe(node)}: no gradient passes {describe(stops)}"
        if found.on_left and (is_sharded(out) or is_sharded(w)):
            return f"{describe(node)}: the weight stands on the left, and is spread over ranks"
        if is_sharded(out) or is_sharded(w):
            divided = spread.divisions(x, w, _bias(found), out, transposed)
            if isinstance(divided, str):
                return f"{describe(node)}: {divided}"
        elif before_local(way[0]) is not None and tuple(w.shape) != (weight.multiplied.rows, weight.multiplied.cols):
            return f"{describe(node)}: its part of the weight is a shard of {tuple(w.shape)} that nobody gathered"
        dtypes = [value(n).dtype for n in way] + [out.dtype]  # the operator casts the parameter to its result's dtype
        if not is_one_cast(dtypes):
            rounds = next(n for n in way if not holds(value(n).dtype, w.dtype))
            return f"rounded by {describe(rounds)}"
        reason = self._context.why_unsupported(x.device.type, out.dtype, w.dtype, weight.grid.block)
        if reason is None and weight.index is None:
            weight.to_device(w.device)  # where it was before it had no use for an index
        return reason if weight.index is not None else reason or f"no kernel for block {weight.grid.block}"

    def _index(self, region: Region, key: int) -> fx.Node:
        """The placeholder of a weight's index in Dynamo's own graph, made at the first use."""
        if key not in self._indices:
            while region.outer is not None:
                region = region.outer
            example = fake_index(self._context.weights[key], self._mode)
            node = add_placeholder(region.graph, f"mst_index_{key}", example)
            # A static address at every call, as for parameters; and AOTAutograd reads the source of each input.
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node._dynamo_source = None  # type: ignore[attr-defined]
            self._indices[key] = node
            self._context.indices.append(key)
        return self._indices[key]

    def _replace(self, node: fx.Node, found: Match, base: fx.Node, index: fx.Node, key: int, transposed: bool) -> None:
        emit, out, weight = Emitter(node), value(node), self._context.weights[key]
        bias, extra = found.bias, None
        if _bias(found) is None:
            bias, extra = None, bias  # what is added may be any broadcastable tensor
        x = found.x if value(found.x).dtype == out.dtype else emit("to", found.x, out.dtype)
        x = emit("transpose", x, -2, -1) if found.on_left else x
        lead = list(value(x).shape[:-1])
        # Of what has four dimensions or more Inductor takes the second for channels where a convolution is near, and
        # would lay the hidden units of these layers out so: each product would copy them back.
        flat = len(lead) >= 3 and not is_sharded(out) and all(type(size) is int for size in lead)
        x = emit("flatten", x, 0, -2) if flat else x
        # Rounded, so that weights of nearly the same density share compiled code.
        density = max(0.01, round(weight.density_target, 2))
        given = (x, base, bias, index, weight.grid.block, transposed, density, self._context.choose)
        here = value(x)
        if is_sharded(out):
            divided = spread.divisions(here, value(base), _bias(found), out, transposed)
            new = emit(spread.linear, *given, [int(along) for along in divided])
            here = here.to_local()
        else:
            new = emit(torch.ops.mst.linear.default, *given, *self._copy(emit, base, out))
        new = emit("unflatten", new, 0, lead) if flat else new
        if found.on_left:  # copied, as what follows may rely on the layout that the product has
            new = emit("contiguous", emit("transpose", new, -2, -1))
        product = Product(tuple(here.shape), out.dtype, transposed, bias is not None)
        self._context.products.setdefault(key, []).append(product)
        if extra is not None:
            extra = extra if value(extra).dtype == out.dtype else emit("to", extra, out.dtype)
            new = emit(operator.add, new, extra)
        new.meta["example_value"] = out
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        _erase_dead(found.weight)

    def _copy(self, emit: Emitter, weight: fx.Node, out: torch.Tensor) -> list[fx.Node]:
        """The weight in the activations' dtype, made once for all products, if the device wants it so."""
        if value(weight).dtype == out.dtype or not self._context.rounds_weights(out.device.type):
            return []
        key = weight, out.dtype
        if key not in self._rounded:
            detached = emit("detach", weight)
            detached.meta[_ROUNDS] = True
            self._rounded[key] = emit("to", detached, out.dtype)
        return [self._rounded[key]]

    def report(self, graph_module: fx.GraphModule) -> None:
        """Note every use of a sparse weight that stays dense."""
        for region, node in walk(graph_module):
            key = self._keys.get(region.origin(before_local(node) or node))
            for user in node.users if key is not None else ():
                served = user.target in SERVED or user.meta.get(_ROUNDS)
                if not served and name(user) != _ACCUMULATE and before_local(user) is None:
                    self._context.unmatched.setdefault(key, [f"used by {describe(user)}"])  # type: ignore[arg-type]


def multiplied_alone(graph_module: fx.GraphModule, keys: Mapping[fx.Node, int]) -> set[int]:
    """Of a rewritten graph: keys of the weights that nothing but ``mst::linear`` takes, as its weight. Their gradients
    are sums of what ``mst::linear_grad_weight`` returns, 0 outside the active blocks."""
    found = set(keys.values())
    for region, node in walk(graph_module):
        key = keys.get(region.origin(node))
        for user in node.users if key is not None else ():
            takes = calls(user, {torch.ops.mst.linear.default}) and user.args[1] is node
            others = [user.args[0], *user.args[2:]] if takes else []
            passes = calls(user, {CHECKPOINT}) or user.meta.get(_ROUNDS)
            if not passes and not (takes and node not in others):
                found.discard(key)
    return found


def _bias(found: Match) -> Any:
    """The bias that the operator adds: what is broadcast otherwise is added behind it."""
    bias, outputs = value(found.bias), value(found.weight).shape[0 if found.rows_are_out else 1]
    return bias if bias is not None and bias.dim() == 1 and same_size(bias.shape[0], outputs) else None


def _way_from_source(node: Any) -> tuple[list[Any], bool]:
    """Follow transposes and casts of a 2-D tensor back; returns the nodes from its source on, and whether it enters
    transposed."""
    way, transposed = [node], False
    while True:
        swapped = before_swap(way[0])
        if swapped is not None and value(swapped).dim() != 2:
            break
        source = before_cast(way[0]) if swapped is None else swapped
        if source is None:
            break
        transposed ^= swapped is not None
        way.insert(0, source)
    return way, transposed


def fake_index(weight: SparseWeight, mode: Any) -> torch.Tensor:
    """The weight's index as Dynamo's graphs see it."""
    assert weight.index is not None
    return weight.index if mode is None else mode.from_tensor(weight.index, static_shapes=True)


def _erase_dead(node: Any) -> None:
    """Remove a chain of views of a weight that nobody uses any more."""
    while isinstance(node, fx.Node) and node.op != "placeholder" and not node.users:
        source = node.args[0]
        node.graph.erase_node(node)
        node = source
