"""Find attention that is written out: ``softmax(q k^T, scaled and masked) v``, whatever stands in between.

Only the shape of the region is looked at here: which products enter and leave it, and that nothing else reads what is
inside. What happens to the scores on their way into the softmax is tried out by :mod:`.causality`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from mst_compile.graph.attention.evaluate import Product
from mst_compile.graph.linear import value

_SOFTMAX = {torch.softmax, torch.nn.functional.softmax}
_DROPOUT = {torch.dropout, torch.nn.functional.dropout}
_PRODUCTS = {torch.matmul, torch.bmm, operator.matmul, torch.baddbmm}
_EINSUMS = {torch.einsum, torch.functional.einsum}
_CASTS = {"to", "float", "type", "type_as", "bfloat16", "half", "double", "contiguous", "clone"}
_RESHAPES = {"view", "reshape", "unflatten", "flatten"}
_POINTWISE = {
    "add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "div_", "truediv", "itruediv",
    "true_divide", "neg", "where", "masked_fill", "masked_fill_", "maximum", "minimum", "clamp", "tanh", "abs", "pow",
    "relu", "exp",
}  # fmt: skip
_MAX_NODES = 100


@dataclass
class Chain:
    """One softmax between two products; ``inner`` are the nodes that nothing else needs, in order."""

    softmax: fx.Node
    entering: fx.Node
    out: fx.Node
    product: Product
    q: fx.Node
    k_transposed: fx.Node
    v: fx.Node
    inner: list[fx.Node]
    reason: str | None
    dropout: list[Any]

    def signature(self) -> tuple[Any, ...]:
        """Equal for chains that treat their scores alike: other layers with the same mask need not be tried out."""
        number = {n: i for i, n in enumerate(self.inner)}

        def name(item: Any) -> Any:
            return ("inner", number[item]) if item in number else item

        steps = [(n.target, repr(fx.node.map_arg((n.args, n.kwargs), name))) for n in self.inner[1:]]
        product = (self.product.alpha, self.product.beta, self.product.extra, self.product.pointwise)
        return (str(value(self.product.node).shape), product, str(steps))


def is_softmax(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in _SOFTMAX) or (
        node.op == "call_method" and node.target == "softmax"
    )


def dropout_of(node: fx.Node) -> Any:
    """The rate that a dropout node runs with."""
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
    return given.get("p", 0.5) if given.get("training", given.get("train", True)) else 0.0


def dataflow(graph: fx.Graph) -> networkx.DiGraph:
    """The graph's nodes, with an edge to each user."""
    flow = networkx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((node, user) for node in graph.nodes for user in node.users)
    return flow


def find_chain(flow: networkx.DiGraph, softmax: fx.Node) -> Chain | None:
    """The attention around a softmax, or None where there is none."""
    entering = softmax.args[0] if softmax.args else softmax.kwargs.get("input")
    shape = getattr(value(entering), "shape", ())
    if not isinstance(entering, fx.Node) or len(shape) < 3:
        return None
    products = list(_products_before(entering))
    carriers, out = _product_after(softmax)
    if not products or out is None:
        return None
    product, q, k_transposed = _operands(products[0])
    v = _operands(out)[2]
    between = networkx.descendants(flow, product.node) & networkx.ancestors(flow, out)
    written = {n for n in product.node.users if not n.users and n.op == "call_method" and str(n.target).endswith("_")}
    inner = [n for n in softmax.graph.nodes if n in between | written or n is product.node]
    steps = [n for n in inner if n not in carriers and n is not product.node]
    names = {_name(n) for n in steps}
    dropout = [dropout_of(c) for c in carriers if _is_dropout(c)]
    chain = Chain(softmax, entering, out, product, q, k_transposed, v, inner, None, dropout)  # type: ignore[arg-type]
    chain.product = Product(product.node, product.alpha, product.beta, product.extra, names <= _POINTWISE | _CASTS)
    chain.reason = _why_not(chain, products, carriers)
    return chain


def _why_not(chain: Chain, products: list[fx.Node], carriers: list[fx.Node]) -> str | None:
    softmax = chain.softmax
    if {products[0].target, chain.out.target} & _EINSUMS:
        return "its products are einsums"
    if len(products) > 1:
        return "several products enter its softmax"
    given = dict(zip(("input", "dim"), softmax.args, strict=False)) | dict(softmax.kwargs)
    if given.get("dim") not in (-1, value(chain.entering).dim() - 1):
        return "its softmax is not over the keys"
    if _operands(chain.out)[1] not in carriers:
        return "its weights are changed before they meet the values"
    inner = set(chain.inner)
    if chain.v in inner or not isinstance(chain.v, fx.Node):
        return "its values depend on its scores"
    if any(user not in inner and user is not chain.out for n in chain.inner for user in n.users):
        return "its scores or weights are used elsewhere"
    for n in chain.inner:
        if n is chain.product.node or n in carriers:
            continue
        name = _name(n)
        if n.op not in ("call_function", "call_method") or name not in _POINTWISE | _CASTS | _RESHAPES:
            return f"its scores go through {name}"
        if name in _RESHAPES and value(n).shape[-2:] != value(n.args[0]).shape[-2:]:
            return "its scores change their shape"
    return None


def _products_before(node: fx.Node) -> Iterator[fx.Node]:
    """Products that lead to ``node`` by way of no other product, and are of its size."""
    seen: set[fx.Node] = set()
    stack = [node]
    size = value(node).shape[-2:]
    while stack and len(seen) < _MAX_NODES:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if _is_product(n):
            if value(n).shape[-2:] == size and value(n).dim() >= 3:
                yield n
        elif n.op in ("call_function", "call_method") and isinstance(value(n), Tensor):
            stack.extend(n.all_input_nodes)


def _product_after(softmax: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The nodes that hand a softmax on unchanged, itself first, and the product that it enters on the left.

    A product that it enters changed is named too, for the report.
    """
    carriers, i = [softmax], 0
    reached = [softmax]
    while i < len(reached):
        n = reached[i]
        for user in n.users:
            if _is_product(user) and _name(user) != "baddbmm" and _operands(user)[1] is n:
                return carriers, user
            first = user.args[:1] == (n,)
            if n in carriers and first and (_is_dropout(user) or _name(user) in _CASTS | _RESHAPES):
                carriers.append(user)
                reached.append(user)
            elif _name(user) in _POINTWISE | _CASTS | _RESHAPES and len(reached) < _MAX_NODES:
                reached.append(user)
        i += 1
    return carriers, None


def _operands(node: fx.Node) -> tuple[Product, Any, Any]:
    """A product's left and right operand, and how it uses them."""
    if node.target in _EINSUMS:
        return Product(node), node.args[1], node.args[2]
    if _name(node) != "baddbmm":
        return Product(node), node.args[0], node.args[1]
    given = dict(zip(("input", "batch1", "batch2"), node.args, strict=False)) | dict(node.kwargs)
    extra = given["input"] if given.get("beta", 1) else None
    product = Product(node, given.get("alpha", 1), given.get("beta", 1), extra)  # type: ignore[arg-type]
    return product, given["batch1"], given["batch2"]


def _is_product(node: fx.Node) -> bool:
    if not isinstance(value(node), Tensor):
        return False
    if node.op == "call_function" and node.target in _EINSUMS:
        return len(node.args) == 3 and isinstance(node.args[0], str)
    if node.op == "call_function" and node.target not in _PRODUCTS:
        return False
    names = ("matmul", "bmm", "__matmul__", "baddbmm")
    return (node.op == "call_function" or node.target in names) and (len(node.args) >= 2 or _name(node) == "baddbmm")


def _is_dropout(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _DROPOUT


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
