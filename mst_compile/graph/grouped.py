"""Find products with stacks of matrices in a Dynamo graph, as mixtures of experts make them, and rewrite them to
``mst::grouped_linear``.

Either rows come sorted by matrix, and offsets say where those of each end; or there is a batch dimension as long as the
stack, and each matrix multiplies its entry. Products with a single matrix are :mod:`mst_compile.graph.linear`'s.

A product that is written in a new way needs a function in :data:`FORMS`, and nothing else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mst_compile.blocks.shards import is_sharded
from mst_compile.graph import spread
from mst_compile.graph.context import Context, Product
from mst_compile.graph.fx import (
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
from mst_compile.graph.order import laid_out, stored_order
from mst_compile.graph.served import Operand, Serving, density_of, erase_dead, held_shape
from mst_compile.lowering.device import BATCH, COPIES, GROUPED, LOOP


@dataclass
class Match:
    """Products with the matrices of a stack.

    Attributes:
        weight: leads to the parameter.
        rows_are_out: whether it enters as ``[E, out, in]``.
        offsets: where the rows of each matrix end in ``x`` ``[S, in]``; None: there is a batch dimension.
        x_dims, out_dims: then, a letter for each dimension of ``x`` and of the result: ``e`` for the batch dimension,
            which ``x`` may lack if every matrix multiplies the same, ``k`` for what is summed over, ``n`` for the
            outputs, others for tokens.
        plus: what is added, broadcast to the result.
        dense: how the program multiplies, see :class:`mst_compile.lowering.device.Layer`.
    """

    x: Any
    weight: Any
    rows_are_out: bool
    offsets: Any = None
    x_dims: str = "tk"
    out_dims: str = "tn"
    plus: Any = None
    dense: str = BATCH


# ---- forms -----------------------------------------------------------------------------------------------------------


def _grouped_mm(node: fx.Node) -> Match | None:
    """PyTorch's own; with offsets, or of as many matrices on either side."""
    if not calls(node, {torch._grouped_mm, getattr(torch.nn.functional, "grouped_mm", None)}):
        return None
    given = arguments(node, "mat_a", "mat_b", "offs", "bias", "out_dtype")
    x, weight, offsets = value(given["mat_a"]), value(given["mat_b"]), given.get("offs")
    if given.get("bias") is not None or not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return None
    if weight.dim() != 3 or x.dim() != (3 if offsets is None else 2) or value(node).dtype != x.dtype:
        return None
    if offsets is None:
        return Match(given["mat_a"], given["mat_b"], False, None, "etk", "etn")
    return Match(given["mat_a"], given["mat_b"], False, offsets, dense=GROUPED)


def _fallback_of_transformers(node: fx.Node) -> Match | None:
    """What transformers calls where PyTorch's own does not compile. Known by name: the library need not be there."""
    if node.op != "call_function" or not str(node.target).startswith("transformers.grouped_mm_fallback"):
        return None
    if "backward" in str(node.target):
        return None
    given = arguments(node, "input", "weight", "offs")
    return Match(given["input"], given["weight"], False, given["offs"], dense=LOOP)


def _product(node: fx.Node) -> Match | None:
    """``x @ W``; of more dimensions than three, those in front are tokens too."""
    if not calls(node, PRODUCTS) or node.kwargs or len(node.args) != 2:
        return None
    x, weight = node.args
    dims = _dims(x, "tk")
    return None if dims is None else Match(x, weight, False, None, dims, _out(dims, "tn"))


def _product_from_left(node: fx.Node) -> Match | None:
    """``W @ x``, tokens last."""
    if not calls(node, PRODUCTS) or node.kwargs or len(node.args) != 2:
        return None
    weight, x = node.args
    dims = _dims(x, "kt")
    return None if dims is None else Match(x, weight, True, None, dims, _out(dims, "nt"))


def _dims(x: Any, matrix: str) -> str | None:
    """Letters for the dimensions of an operand of ``matmul`` whose last ones are ``matrix``."""
    tensor = value(x)
    if not isinstance(tensor, Tensor) or not 1 <= tensor.dim() <= 9:
        return None
    if tensor.dim() <= 2:
        return matrix if tensor.dim() == 2 else "k"
    return "ABCDEF"[: tensor.dim() - 3] + "e" + matrix


def _out(dims: str, matrix: str) -> str:
    if dims == "k":
        return "en"
    return dims[:-2] + ("" if "e" in dims else "e") + matrix


def _baddbmm(node: fx.Node) -> Match | None:
    if not calls(node, {torch.baddbmm, "baddbmm"}) or node.kwargs or len(node.args) != 3:
        return None
    plus, x, weight = node.args
    return Match(x, weight, False, None, "etk", "etn", plus)


def _einsum(node: fx.Node) -> Match | None:
    """``etk,enk->etn``, whatever the letters and the order of the input's and the result's."""
    return _summed(node, 1, 2)


def _einsum_from_left(node: fx.Node) -> Match | None:
    """``enk,etk->etn``."""
    return _summed(node, 2, 1)


def _summed(node: fx.Node, at: int, weight_at: int) -> Match | None:
    """An einsum of an input and a stack, which are the arguments ``at`` and ``weight_at``."""
    letters = einsum_of_two(node, at, weight_at)
    if letters is None:
        return None
    x, w, out = letters
    if not (x + w + out).isalpha() or len(w) != 3 or any(len(set(dims)) != len(dims) for dims in (x, w, out)):
        return None
    summed, outputs = set(w[1:]) - set(out), set(w[1:]) - set(x)
    if w[0] not in out or len(summed) != 1 or len(outputs) != 1 or summed == outputs:
        return None
    k, n = *summed, *outputs
    if set(out) != set(x) - {k} | {n, w[0]}:
        return None
    tokens = [letter for letter in x if letter not in (w[0], k)]
    names = str.maketrans({w[0]: "e", k: "k", n: "n", **dict(zip(tokens, "ABCDEFGHIJ", strict=False))})
    return Match(node.args[at], node.args[weight_at], w[2] == k, None, x.translate(names), out.translate(names))


FORMS: list[Callable[[fx.Node], Match | None]] = [
    _grouped_mm, _fallback_of_transformers, _product, _baddbmm, _einsum, _product_from_left, _einsum_from_left,
]  # fmt: skip
"""The ways to write products with a stack. Each looks at one node and says what it computes, or None."""


def matches(node: fx.Node) -> Iterator[Match]:
    """What ``node`` may compute by its form: which of two operands is the stack it does not say."""
    return (found for found in (form(node) for form in FORMS) if found is not None)


# ---- the pass --------------------------------------------------------------------------------------------------------


def run(graph_module: fx.GraphModule, context: Context) -> int:
    """Rewrite products with sparse stacks in place; returns how many."""
    if not any(weight.stacked for weight in context.weights.values()):
        return 0
    serving = Serving(graph_module, context)
    return sum(_visit(serving, context, region, node) for region, node in walk(graph_module))


def _visit(serving: Serving, context: Context, region: Region, node: fx.Node) -> bool:
    """Rewrite a product with a whole stack, or note why it stays dense."""
    serving.note_writes(region, node)
    for found in matches(node):
        operand = serving.operand(region, found.weight)
        if operand is None or operand.matrix is not None or not context.weights[operand.key].stacked:
            continue
        reason = serving.why_written(region, node, operand) or _why_not(serving, context, node, found, operand)
        if reason is not None:
            context.unmatched.setdefault(operand.key, []).append(reason)
            return False
        _replace(context, node, found, operand, serving.index(region, operand.slot))
        context.matched.setdefault(operand.key, []).append(node.meta.get("stack_trace") or "")
        return True
    return False


def _why_not(serving: Serving, context: Context, node: fx.Node, found: Match, operand: Operand) -> str | None:
    out, x, w = value(node), value(found.x), value(operand.base)
    if not all(isinstance(v, Tensor) for v in (out, x, w)):
        return f"{describe(node)}: its tensors are unknown, or within a transform of torch.func"
    if x.is_nested:
        return f"{describe(node)}: its input is a nested tensor"
    if len(found.x_dims) != x.dim() or len(found.out_dims) != out.dim():
        return f"{describe(node)}: dimensions of its input are broadcast"
    if operand.chosen is not None and found.offsets is not None:
        return f"{describe(node)}: groups of matrices that a tensor chooses"
    if is_sharded(out) or is_sharded(w) or is_sharded(x):
        if operand.chosen is not None:
            return f"{describe(node)}: matrices that a tensor chooses of a stack that is spread over ranks"
        layouts = _layouts(node, found, operand)
        if isinstance(layouts, str):
            return f"{describe(node)}: {layouts}"
    elif tuple(w.shape) != held_shape(context.weights[operand.key]):
        return f"{describe(node)}: its part of the weight is a shard of {tuple(w.shape)} that nobody gathered"
    summed = x.shape[found.x_dims.index("k")]
    if not same_size(summed, w.shape[1 if _transposed(found, operand) else 2]):
        return f"{describe(node)}: its input has one feature, broadcast to all of the weight's"
    return serving.why_unread(node, operand) or serving.why_no_kernel(operand, out)


def _layouts(node: fx.Node, found: Match, operand: Operand) -> spread.Layouts | str:
    """What ranks multiply of DTensors, or why they cannot."""
    given = value(found.x), value(operand.base), value(found.offsets), value(node)
    return spread.stack_layouts(*given, found.x_dims, found.out_dims)


def _transposed(found: Match, operand: Operand) -> bool:
    return found.rows_are_out == operand.swapped


def _replace(context: Context, node: fx.Node, found: Match, operand: Operand, index: fx.Node) -> None:
    emit, out, weight = Emitter(node), value(node), context.weights[operand.key]
    transposed, base, offsets = _transposed(found, operand), operand.base, found.offsets
    x = given_x = found.x if value(found.x).dtype == out.dtype else emit("to", found.x, out.dtype)
    layouts = _layouts(node, found, operand) if is_sharded(out) else None
    if isinstance(layouts, spread.Layouts):
        x = emit(spread.local, x, layouts.x, layouts.grad_x)
        base = emit(spread.local, base, layouts.weight, layouts.grad_weight)
        offsets = offsets and emit(spread.local, offsets, layouts.x, layouts.x)
    matrices = int(value(base).shape[0])
    lead, dims, back = [], found.x_dims, None
    if offsets is None:
        batch = matrices if operand.chosen is None else _size(emit, operand.chosen, 0)
        x, dims = _batch_first(emit, x, dims, batch)
        lead = [_size(emit, x, dim) for dim in range(len(dims) - 1)]
        if operand.chosen is None:
            ends = emit(torch.arange, 1, matrices + 1, dtype=torch.int32, device=value(x).device)
        else:
            order, back, ends = _sorted_by_matrix(emit, operand.chosen, matrices)
            x = emit("index_select", x, 0, order)
        offsets = _times(emit, ends, lead[1:])
        x = emit("reshape", x, -1, value(x).shape[-1])
    given = (base, offsets, index, weight.grid.block, transposed, density_of(weight), context.choose)
    new = emit(torch.ops.mst.grouped_linear.default, x, *given)
    dense = found.dense if operand.chosen is None else COPIES
    product = Product(tuple(value(x).shape), out.dtype, transposed, False, matrices, dense)
    context.products.setdefault(operand.slot, []).append(product)
    if found.offsets is None:
        new = emit("view", new, *lead, value(new).shape[-1])
        new = new if back is None else emit("index_select", new, 0, back)
        new = laid_out(emit, new, dims[:-1] + "n", found.out_dims, out)
    if isinstance(layouts, spread.Layouts):
        told = found.x_dims, found.out_dims, stored_order(found.out_dims, out), 2 if transposed else 1
        new = emit(spread.joined, new, given_x, operand.base, layouts.out, *told)
    if found.plus is not None:
        plus = found.plus if value(found.plus).dtype == out.dtype else emit("to", found.plus, out.dtype)
        new = emit(operator.add, new, plus)
    new.meta["example_value"] = out
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    erase_dead(found.weight)


def _sorted_by_matrix(emit: Emitter, chosen: fx.Node, matrices: int) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Of entries that each say which matrix is theirs: the order that sorts them by matrix, the one that brings them
    back, and where those of each matrix end, int32 ``[matrices]``."""
    every = emit(torch.arange, matrices, device=value(chosen).device)
    mine = emit(operator.getitem, every, chosen)  # of numbers from behind too; and others are refused, as they were
    order = emit("argsort", mine, stable=True)
    before = emit("sum", emit(operator.le, emit("unsqueeze", mine, 1), every), 0, dtype=torch.int32)
    return order, emit("argsort", order), before


def _batch_first(emit: Emitter, x: fx.Node, dims: str, matrices: Any) -> tuple[fx.Node, str]:
    """``x`` with its batch dimension, which it gets if it has none, in front, and its features last."""
    several = isinstance(matrices, fx.Node) or matrices > 1
    if "e" in dims and several and same_size(value(x).shape[dims.index("e")], 1):
        x, dims = emit("squeeze", x, dims.index("e")), dims.replace("e", "")
    if "e" not in dims:
        x = emit("expand", emit("unsqueeze", x, 0), matrices, *[-1] * len(dims))
        dims = "e" + dims
    order = "e" + dims.replace("e", "").replace("k", "") + "k"
    return (x if order == dims else emit("permute", x, *map(dims.index, order))), order


def _size(emit: Emitter, x: fx.Node, dim: int) -> Any:
    """A size as a number, or as the node of one that may vary."""
    size = value(x).shape[dim]
    return size if type(size) is int else emit("size", x, dim)


def _times(emit: Emitter, ends: fx.Node, tokens: list[Any]) -> fx.Node:
    """Where the rows of each matrix end, given where its entries do, each of as many rows as ``tokens`` come to."""
    known = math.prod(size for size in tokens if type(size) is int)
    for size in (known, *(size for size in tokens if type(size) is not int)):
        ends = ends if type(size) is int and size == 1 else emit(operator.mul, ends, size)
    return ends
