"""What the passes over products share: which sparse weight an operand is, whether it can be served, and its index.

The packed index of each weight enters as a placeholder after all others, so that a topology change is new data, never a
new graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mst_compile.graph import spread
from mst_compile.graph.context import Context
from mst_compile.graph.fx import (
    CHECKPOINT,
    EINSUMS,
    LINEARS,
    PRODUCTS,
    UNBINDS,
    Emitter,
    Region,
    add_placeholder,
    before_cast,
    before_local,
    before_selection,
    before_swap,
    calls,
    describe,
    fake_mode,
    holds,
    is_one_cast,
    keeps_gradient,
    name,
    placeholders,
    storage,
    value,
    walk,
    written,
)
from mst_compile.state.weight import SparseWeight

# Products that take a sparse weight as their second argument.
_MULTIPLY = {torch.ops.mst.linear.default, torch.ops.mst.grouped_linear.default}
# Products as models write them.
_PRODUCTS = {*LINEARS, *PRODUCTS, *EINSUMS, torch.addmm, torch.baddbmm, "addmm", "baddbmm"}
# What may use a weight that is served. In backward passes, as compiled autograd hands them over, are the products of
# graphs that were compiled before, and gradients are added up.
SERVED = {
    *_MULTIPLY,
    torch.ops.mst.linear_grad_input.default,
    torch.ops.mst.grouped_linear_grad_input.default,
    spread.linear,
    spread.local,
    spread.joined,
    CHECKPOINT,
}
_ACCUMULATE = "AccumulateGrad"
ROUNDS = "mst_rounds"  # in the meta of what makes a weight's copy in the activations' dtype


@dataclass(frozen=True)
class Operand:
    """A sparse weight as an operand of a product.

    Attributes:
        key: of the weight in the context.
        way: the nodes from the parameter, or from what this rank holds of it, to the operand.
        swapped: whether the last two dimensions have changed places on the way.
        matrix: which one of a stack it is; None if it is the whole weight.
    """

    key: int
    way: list[Any]
    swapped: bool
    matrix: int | None

    @property
    def base(self) -> fx.Node:
        """The parameter, or what this rank holds of it."""
        return self.way[0]  # type: ignore[no-any-return]


class Serving:
    """One run of a pass over a graph whose sparse weights it serves."""

    def __init__(self, graph_module: fx.GraphModule, context: Context) -> None:
        inputs = placeholders(graph_module.graph)
        self._keys = {inputs[i]: i for i in context.weights}
        self._context, self._mode = context, fake_mode(graph_module.graph)
        self._writers: dict[int | None, fx.Node] = {}  # memory that nodes so far have written to -> the last

    def note_writes(self, region: Region, node: fx.Node) -> None:
        """Remember what memory a node writes to, outside of its checkpoint too."""
        memory = {storage(n) for n in written(node)} - {None}
        while region.outer is not None and memory:
            memory |= {storage(outside) for inside, outside in region.sources.items() if storage(inside) in memory}
            region = region.outer
        self._writers |= dict.fromkeys(memory - {None}, node)

    def operand(self, region: Region, node: Any) -> Operand | None:
        """The sparse weight that ``node`` is, up to casts, transposes and the choice of one of a stack's matrices."""
        way, swapped, matrix = _way_from_source(node)
        key = self._keys.get(region.origin(before_local(way[0]) or way[0]))
        return None if key is None else Operand(key, way, swapped, matrix)

    def why_written(self, region: Region, node: fx.Node, found: Operand) -> str | None:
        """Why the weight may have other values here than it had before the graph ran, or None: those are looked at."""
        whole = before_local(found.base)
        held = found.way if whole is None else [whole, *found.way]
        writer = next((self._writers[m] for n in held if (m := storage(region.origin(n))) in self._writers), None)
        return None if writer is None else f"{describe(node)}: its values are changed before by {describe(writer)}"

    def why_unread(self, node: fx.Node, found: Operand) -> str | None:
        """Why the parameter itself cannot be read in place of the operand, or None."""
        stops = next((n for n in found.way if not keeps_gradient(n, found.base, node)), None)
        return None if stops is None else f"{describe(node)}: no gradient passes {describe(stops)}"

    def why_no_kernel(self, found: Operand, out: Tensor) -> str | None:
        """Why there is no product with the weight whose result is ``out``, or None."""
        weight, w = self._context.weights[found.key], value(found.base)
        dtypes = [value(n).dtype for n in found.way] + [out.dtype]  # operators cast the parameter to the result's dtype
        if not is_one_cast(dtypes):
            rounds = next(n for n in found.way if not holds(value(n).dtype, w.dtype))
            return f"rounded by {describe(rounds)}"
        reason = self._context.why_unsupported(out.device.type, out.dtype, w.dtype, weight.grid.block)
        if reason is None and weight.index is None:
            weight.to_device(w.device)  # where it was before it had no use for an index
        if weight.index is not None:
            return reason
        what = f"a stack of matrices on {w.device.type}" if weight.stacked else f"block {weight.grid.block}"
        return reason or f"no kernel for {what}"

    def index(self, region: Region, key: int) -> fx.Node:
        """The placeholder of a weight's index, as a node of the region; made at the first use."""
        outermost = region
        while outermost.outer is not None:
            outermost = outermost.outer
        known = self._context.indices
        if key not in known:
            example = fake_index(self._context.weights[key], self._mode)
            node = add_placeholder(outermost.graph, f"mst_index_{key}", example)
            # A static address at every call, as for parameters; and AOTAutograd reads the source of each input.
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node._dynamo_source = None  # type: ignore[attr-defined]
            known.append(key)
        return region.receive(placeholders(outermost.graph)[known.index(key) - len(known)])


def matrix_of(emit: Emitter, stack: fx.Node, matrix: int) -> fx.Node:
    """One of a stack's matrices, or of its indices."""
    return emit(operator.getitem, stack, matrix)


def held_shape(weight: SparseWeight) -> tuple[int, ...]:
    """Shape of what products on this rank multiply of a weight: the whole, but of a tensor-parallel one."""
    rows, cols, _, *matrices = weight.signature
    return (*matrices, rows, cols)


def density_of(weight: SparseWeight) -> float:
    """What kernels are tuned for: rounded, so that weights of nearly the same density share compiled code."""
    return max(0.01, round(weight.density_target, 2))


def fake_index(weight: SparseWeight, mode: Any) -> Tensor:
    """The weight's index as Dynamo's graphs see it."""
    assert weight.index is not None
    return weight.index if mode is None else mode.from_tensor(weight.index, static_shapes=True)


def erase_dead(node: Any) -> None:
    """Remove a chain of views of a weight that nobody uses any more."""
    while isinstance(node, fx.Node) and node.op != "placeholder" and not node.users:
        source = node.args[0]
        node.graph.erase_node(node)
        node = source


def _way_from_source(node: Any) -> tuple[list[Any], bool, int | None]:
    """Follow transposes and casts of a matrix, or of a stack of them, back; returns the nodes from its source on,
    whether it enters transposed, and which one of a stack it is."""
    way, swapped, matrix = [node], False, None
    while True:
        source = before_swap(way[0])
        if source is not None and value(source).dim() > 3:
            break
        if source is not None:
            swapped = not swapped
        else:
            source = before_cast(way[0])
        if source is None:
            source, chosen = before_selection(way[0])
            if source is None or value(source).dim() != 3:
                break
            matrix = chosen
        way.insert(0, source)
    return way, swapped, matrix


# ---- what is left ----------------------------------------------------------------------------------------------------


def report(graph_module: fx.GraphModule, context: Context) -> int:
    """The pass behind those that serve: notes every use of a sparse weight that stays dense, and changes nothing."""
    inputs = placeholders(graph_module.graph)
    keys = {inputs[i]: i for i in context.weights}
    for region, node in walk(graph_module):
        key = keys.get(region.origin(before_local(node) or node))
        stacked = key is not None and context.weights[key].stacked
        for _, user in _uses(node, stacked) if key is not None else ():
            served = user.target in SERVED or user.meta.get(ROUNDS)
            # Dynamo may make a graph of the view alone that to_local() returns: its products are in others.
            passed_on = before_local(user) is not None or (name(user) == "view_as" and user.args == (node, node))
            if not served and name(user) != _ACCUMULATE and not passed_on:
                context.unmatched.setdefault(key, [_why_dense(user, stacked)])  # type: ignore[arg-type]
    return 0


def _why_dense(user: fx.Node, stacked: bool) -> str:
    if stacked and calls(user, {operator.getitem}) and not isinstance(user.args[1], int | slice):
        return f"{describe(user)}: copies matrices of a stack as a tensor says; grouped products read them in place"
    return f"used by {describe(user)}"


def _uses(node: fx.Node, stacked: bool) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who uses a weight, or one of a stack's matrices, and that: the node and its user."""
    for user in node.users:
        if stacked and (calls(user, UNBINDS) or before_selection(user)[0] is not None):
            yield from _uses(user, calls(user, UNBINDS))
        else:
            yield node, user


def multiplied_inputs(graph_module: fx.GraphModule) -> set[int]:
    """Positions of the inputs, matrices or of more dimensions, that products take as an operand."""
    inputs = {node: i for i, node in enumerate(placeholders(graph_module.graph))}
    found: set[int] = set()
    for region, node in walk(graph_module):
        for operand in node.all_input_nodes if calls(node, _PRODUCTS) else ():
            at = inputs.get(region.origin(_way_from_source(operand)[0][0]))
            tensor = None if at is None else value(operand)
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                found.add(at)  # type: ignore[arg-type]
    return found


def multiplied_alone(graph_module: fx.GraphModule, keys: Mapping[fx.Node, int], stacks: set[int]) -> set[int]:
    """Of a rewritten graph: keys of the weights that nothing but sparse products takes, as their weight. Their
    gradients are sums of what the operators for weight gradients return, 0 outside the active blocks.

    Args:
        stacks: keys of those that are stacks of matrices, which may be taken one by one.
    """
    found = set(keys.values())
    for region, node in walk(graph_module):
        key = keys.get(region.origin(node))
        for taken, user in _uses(node, key in stacks) if key is not None else ():
            takes = calls(user, _MULTIPLY) and user.args[1] is taken
            others = [user.args[0], *user.args[2:]] if takes else []
            passes = calls(user, {CHECKPOINT}) or user.meta.get(ROUNDS)
            if not passes and not (takes and taken not in others):
                found.discard(key)
    return found
