"""Find attention that is written out: ``softmax(q k^T, scaled and masked) v``, whatever stands in between.

Only the shape of the region is looked at here: which products enter and leave it, and that nothing else reads what is
inside. What happens to the scores on their way into the softmax is tried out by :mod:`.causality`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mst_compile.graph.attention.evaluate import VARIES
from mst_compile.graph.attention.found import Attention, Product
from mst_compile.graph.fx import (
    CASTS,
    DROPOUTS,
    EINSUMS,
    POINTWISE,
    PRODUCTS,
    RESHAPES,
    SOFTMAXES,
    Region,
    arguments,
    before_swap,
    between,
    calls,
    computes,
    constant,
    keeps_gradient,
    name,
    value,
    written,
)

_BADDBMM = {torch.baddbmm, "baddbmm"}
_KEEP_PLACE = POINTWISE | CASTS
_MAX_NODES = 100


def find(_: Region, node: fx.Node) -> Attention | None:
    """The attention around a softmax, or None where there is none."""
    if not calls(node, SOFTMAXES):
        return None
    entering = arguments(node, "input").get("input")
    shape = getattr(value(entering), "shape", ())
    if not isinstance(entering, fx.Node) or len(shape) < 3:
        return None
    products = list(_products_before(entering))
    carriers, out = _product_after(node)
    if not products or out is None:
        return None
    product, q, k_transposed = _operands(products[0])
    inside = between(node.graph, product.node, out) | _late_writers(product.node)
    inner = [product.node, *(n for n in node.graph.nodes if n in inside)]
    scores = [n for n in inner[1:] if n not in carriers]
    pointwise = all(name(n) in _KEEP_PLACE for n in scores)
    k = before_swap(k_transposed)
    if k is not None and not keeps_gradient(k_transposed, k, out):
        k = None
    found = Attention(
        "manual",
        out,
        q,
        k_transposed if k is None else k,
        _operands(out)[2],
        mask=entering,
        reader=node,
        product=Product(product.node, product.alpha, product.beta, product.extra, pointwise),
        dropout=[_rate(c) for c in carriers if calls(c, DROPOUTS)],
        flipped=k is None,
        inner=inner,
    )
    found.reason = _why_not(found, node, products, carriers)
    return found


def _why_not(found: Attention, softmax: fx.Node, products: list[fx.Node], carriers: list[fx.Node]) -> str | None:
    if calls(products[0], EINSUMS) or calls(found.out, EINSUMS):
        return "its products are einsums"
    assert found.product is not None
    if found.product.alpha is None or found.product.beta is None:
        return f"its mask {VARIES}"
    if len(products) > 1:
        return "several products enter its softmax"
    if arguments(softmax, "input", "dim").get("dim") not in (-1, value(found.mask).dim() - 1):
        return "its softmax is not over the keys"
    if _operands(found.out)[1] not in carriers:
        return "its weights are changed before they meet the values"
    inner = set(found.inner)
    if found.v in inner or not isinstance(found.v, fx.Node):
        return "its values depend on its scores"
    if any(user not in inner and user is not found.out for n in found.inner for user in n.users):
        return "its scores or weights are used elsewhere"
    for n in found.inner[1:]:
        if n in carriers:
            continue
        if not computes(n) or name(n) not in _KEEP_PLACE | RESHAPES:
            return f"its scores go through {name(n)}"
        if name(n) in RESHAPES and value(n).shape[-2:] != value(n.args[0]).shape[-2:]:
            return "its scores change their shape"
    return None


def _late_writers(product: fx.Node) -> set[fx.Node]:
    """In-place statements on the scores whose results nobody uses."""
    return {n for n in product.users if not n.users and n.op == "call_method" and product in written(n)}


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
        elif computes(n) and isinstance(value(n), Tensor):
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
            if _is_product(user) and not calls(user, _BADDBMM) and _operands(user)[1] is n:
                return carriers, user
            first = user.args[:1] == (n,)
            if n in carriers and first and (calls(user, DROPOUTS) or name(user) in CASTS | RESHAPES):
                carriers.append(user)
                reached.append(user)
            elif name(user) in _KEEP_PLACE | RESHAPES and len(reached) < _MAX_NODES:
                reached.append(user)
        i += 1
    return carriers, None


def _operands(node: fx.Node) -> tuple[Product, Any, Any]:
    """A product's left and right operand, and how it uses them."""
    if calls(node, EINSUMS):
        return Product(node), node.args[1], node.args[2]
    if not calls(node, _BADDBMM):
        return Product(node), node.args[0], node.args[1]
    given = arguments(node, "input", "batch1", "batch2")
    alpha, beta = (constant(given.get(factor, 1)) for factor in ("alpha", "beta"))
    extra = given["input"] if beta != 0 else None
    return Product(node, alpha, beta, extra), given["batch1"], given["batch2"]


def _is_product(node: fx.Node) -> bool:
    if not isinstance(value(node), Tensor):
        return False
    if calls(node, EINSUMS):
        return len(node.args) == 3 and isinstance(node.args[0], str)
    return calls(node, _BADDBMM) or (calls(node, PRODUCTS) and len(node.args) >= 2)


def _rate(dropout: fx.Node) -> Any:
    """The rate that a dropout node runs with."""
    given = arguments(dropout, "input", "p", "training")
    return given.get("p", 0.5) if given.get("training", given.get("train", True)) else 0.0
