"""Find products with sparse weights in a Dynamo graph and rewrite them to ``mst::linear``.

The pass works on the graph that Dynamo hands to a backend, before AOTAutograd: there parameters are still inputs
that can be recognised, and ``einsum``, ``matmul`` and ``addmm`` still have their form. One matrix of a stack is a
weight as others are; products with all of them are found by :mod:`mst_compile.graph.grouped`.

A linear layer that is written in a new way needs a function in :data:`FORMS`, and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mst_compile.blocks.shards import is_sharded
from mst_compile.graph import spread
from mst_compile.graph.context import Context, Product
from mst_compile.graph.fx import (
    LINEARS,
    PRODUCTS,
    Emitter,
    Region,
    arguments,
    calls,
    describe,
    einsum_of_two,
    same_size,
    value,
    walk,
)
from mst_compile.graph.order import laid_out
from mst_compile.graph.served import ROUNDS, Operand, Serving, density_of, erase_dead, held_shape, matrix_of, part_of


@dataclass
class Match:
    """``y = x @ W + bias``; ``weight`` leads to the parameter, ``rows_are_out`` if it enters as ``[out, in]``, and
    ``on_left`` if it stands in front, ``y = W @ x``, so that tokens are the last dimension and features that before it.
    ``dims`` are letters of the dimensions of ``x`` and of the result where they stand in another order: ``k`` for the
    features of the one and ``n`` for those of the other.
    """

    x: Any
    weight: Any
    rows_are_out: bool
    bias: Any = None
    on_left: bool = False
    dims: tuple[str, str] | None = None

    @property
    def features(self) -> int:
        """The dimension of ``x`` that is summed over."""
        return self.dims[0].index("k") if self.dims is not None else -2 if self.on_left else -1


# ---- forms -----------------------------------------------------------------------------------------------------------


def _linear(node: fx.Node) -> Match | None:
    if not calls(node, LINEARS):
        return None
    given = arguments(node, "input", "weight", "bias")
    return Match(given["input"], given["weight"], True, given.get("bias"))


def _addmm(node: fx.Node) -> Match | None:
    if not calls(node, {torch.addmm, "addmm"}):
        return None
    given = arguments(node, "input", "mat1", "mat2")
    if given.keys() - {"input", "mat1", "mat2", "beta", "alpha"} or (given.get("beta", 1), given.get("alpha", 1)) != (
        1,
        1,
    ):
        return None
    return Match(given["mat1"], given["mat2"], False, given["input"])


def _inner(node: fx.Node) -> Match | None:
    if not calls(node, {torch.inner, "inner"}) or node.kwargs or len(node.args) != 2:
        return None
    return Match(node.args[0], node.args[1], True)


def _tensordot(node: fx.Node) -> Match | None:
    """Over the last dimension of the input and either of the weight's."""
    if not calls(node, {torch.tensordot}):
        return None
    given = arguments(node, "a", "b", "dims", "out")
    x, dims = value(given["a"]), given.get("dims", 2)
    along = ((-1,), (0,)) if dims == 1 else dims
    pair = isinstance(along, list | tuple) and all(isinstance(d, list | tuple) and len(d) == 1 for d in along)
    if not pair or len(along) != 2 or "out" in given or not isinstance(x, torch.Tensor):
        return None
    (own,), (weights,) = along
    return Match(given["a"], given["b"], weights % 2 == 1) if own % x.dim() == x.dim() - 1 else None


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
    """``...k,nk->...n`` and ``...k,kn->...n``, whatever the letters and the order of the input's and the result's."""
    return _summed(node, 1, 2)


def _einsum_from_left(node: fx.Node) -> Match | None:
    """``nk,...k->...n`` and ``kn,...k->...n``."""
    return _summed(node, 2, 1)


def _summed(node: fx.Node, at: int, weight_at: int) -> Match | None:
    """An einsum of an input and a weight, which are the arguments ``at`` and ``weight_at``."""
    letters = einsum_of_two(node, at, weight_at)
    if letters is None:
        return None
    x, w, out = letters
    if not (x + w + out).isalpha() or len(w) != 2 or any(len(set(dims)) != len(dims) for dims in (x, w, out)):
        return None
    summed, outputs = set(w) - set(out), set(w) - set(x)
    if len(summed) != 1 or len(outputs) != 1 or set(out) != set(x) - summed | outputs:
        return None
    (k,), (n,) = summed, outputs
    tokens = [letter for letter in x if letter != k]
    names = str.maketrans({k: "k", n: "n", **dict(zip(tokens, "ABCDEFGHIJ", strict=False))})
    dims = x.translate(names), out.translate(names)
    usual = x[-1] == k and out == x[:-1] + n
    if not usual and (len(tokens) > 10 or not isinstance(value(node), torch.Tensor)):
        return None
    return Match(node.args[at], node.args[weight_at], w[1] == k, dims=None if usual else dims)


FORMS: list[Callable[[fx.Node], Match | None]] = [
    _linear, _addmm, _product, _inner, _tensordot, _einsum, _product_from_left, _einsum_from_left,
]  # fmt: skip
"""The ways to write a linear layer. Each looks at one node and says what product it computes, or None."""


def matches(node: fx.Node) -> Iterator[Match]:
    """The products that ``node`` may compute by its form: which of two operands is the weight it does not say."""
    return (found for found in (form(node) for form in FORMS) if found is not None)


# ---- the pass --------------------------------------------------------------------------------------------------------


def run(graph_module: fx.GraphModule, context: Context) -> int:
    """Rewrite products with sparse weights in place; returns how many."""
    rewrite = _Rewrite(Serving(graph_module, context), context)
    return sum(rewrite.visit(region, node) for region, node in walk(graph_module))


class _Rewrite:
    """One run of the pass."""

    def __init__(self, serving: Serving, context: Context) -> None:
        self._serving, self._context = serving, context
        self._rounded: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}  # weight, dtype -> its copy

    def visit(self, region: Region, node: fx.Node) -> bool:
        """Whether the node was a product with a sparse weight, and is a sparse one now."""
        self._serving.note_writes(region, node)
        for found in matches(node):
            operand = self._serving.operand(region, found.weight)
            if operand is not None and self._is_matrix(operand):
                return self._serve(region, node, found, operand)
        return False

    def _is_matrix(self, operand: Operand) -> bool:
        return operand.matrix is not None or not self._context.weights[operand.key].stacked

    def _serve(self, region: Region, node: fx.Node, found: Match, operand: Operand) -> bool:
        """Rewrite a product with a sparse weight, or note why it stays dense."""
        transposed = found.rows_are_out == operand.swapped
        # What a weight holds is looked at before the graph runs, so that a write before the product matters most.
        reason = self._serving.why_written(region, node, operand) or self._why_not(node, found, operand, transposed)
        if reason is not None:
            self._context.unmatched.setdefault(operand.key, []).append(reason)
            return False
        self._replace(node, found, operand, self._serving.index(region, operand.slot), transposed)
        self._context.matched.setdefault(operand.key, []).append(node.meta.get("stack_trace") or "")
        return True

    def _why_not(self, node: fx.Node, found: Match, operand: Operand, transposed: bool) -> str | None:
        out, x, w, weight = value(node), value(found.x), value(operand.base), self._context.weights[operand.key]
        if not all(isinstance(v, torch.Tensor) for v in (out, x, w)):
            return f"{describe(node)}: its tensors are unknown, or within a transform of torch.func"
        if x.is_nested:
            return f"{describe(node)}: its input is a nested tensor"
        if not same_size(x.shape[found.features], operand.size[0 if transposed else 1]):
            return f"{describe(node)}: its input has one feature, broadcast to all of the weight's"
        stops = self._serving.why_unread(node, operand) or self._serving.why_no_part(node, operand)
        if stops is not None:
            return stops
        spread_over_ranks = is_sharded(out) or is_sharded(w)
        if spread_over_ranks and (found.on_left or found.dims or weight.stacked):
            why = "the weight is one of a stack" if weight.stacked else "its features do not come last"
            return f"{describe(node)}: {why}, and is spread over ranks"
        if spread_over_ranks:
            divided = spread.divisions(x, w, _bias(found), out, transposed)
            if isinstance(divided, str):
                return f"{describe(node)}: {divided}"
        elif tuple(w.shape) != held_shape(weight):
            return f"{describe(node)}: its part of the weight is a shard of {tuple(w.shape)} that nobody gathered"
        return self._serving.why_no_kernel(operand, out)

    def _replace(self, node: fx.Node, found: Match, operand: Operand, index: fx.Node, transposed: bool) -> None:
        emit, out, weight = Emitter(node), value(node), self._context.weights[operand.key]
        base = part_of(emit, operand)
        if operand.matrix is not None:
            base, index = (matrix_of(emit, stack, operand.matrix) for stack in (base, index))
        bias, extra = found.bias, None
        if _bias(found) is None:
            bias, extra = None, bias  # what is added may be any broadcastable tensor
        x = found.x if value(found.x).dtype == out.dtype else emit("to", found.x, out.dtype)
        x = emit("transpose", x, -2, -1) if found.on_left else x
        if found.dims is not None:
            x = emit("permute", x, *(i for i in range(value(x).dim()) if i != found.features), found.features)
        lead = list(value(x).shape[:-1])
        # Of what has four dimensions or more Inductor takes the second for channels where a convolution is near, and
        # would lay the hidden units of these layers out so: each product would copy them back.
        flat = len(lead) >= 3 and not is_sharded(out) and all(type(size) is int for size in lead)
        x = emit("flatten", x, 0, -2) if flat else x
        given = (x, base, bias, index, weight.grid.block, transposed, density_of(weight), self._context.choose)
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
        if found.dims is not None:
            new = laid_out(emit, new, found.dims[0].replace("k", "") + "n", found.dims[1], out)
        product = Product(tuple(here.shape), out.dtype, transposed, bias is not None)
        self._context.products.setdefault(operand.slot, []).append(product)
        if extra is not None:
            extra = extra if value(extra).dtype == out.dtype else emit("to", extra, out.dtype)
            new = emit(operator.add, new, extra)
        new.meta["example_value"] = out
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        erase_dead(found.weight)

    def _copy(self, emit: Emitter, weight: fx.Node, out: torch.Tensor) -> list[fx.Node]:
        """The weight in the activations' dtype, made once for all products, if the device wants it so."""
        if value(weight).dtype == out.dtype or not self._context.rounds_weights(out.device.type):
            return []
        key = weight, out.dtype
        if key not in self._rounded:
            detached = emit("detach", weight)
            detached.meta[ROUNDS] = True
            self._rounded[key] = emit("to", detached, out.dtype)
        return [self._rounded[key]]


def _bias(found: Match) -> Any:
    """The bias that the operator adds: what is broadcast otherwise is added behind it."""
    bias, outputs = value(found.bias), value(found.weight).shape[0 if found.rows_are_out else 1]
    return bias if bias is not None and bias.dim() == 1 and same_size(bias.shape[0], outputs) else None
