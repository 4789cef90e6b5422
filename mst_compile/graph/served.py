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
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mst_compile.blocks.layout import Part
from mst_compile.blocks.shards import is_sharded
from mst_compile.graph import spread
from mst_compile.graph.context import Context, Slot
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
from mst_compile.graph.views import before_choice, before_part, is_view, turned, within
from mst_compile.state.indexes import index_for
from mst_compile.state.ranges import Range, is_cut
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
        way: the nodes from the parameter, or from what this rank holds of it, to the operand; of views that lead from
            one to a part of it the last.
        swapped: whether the last two dimensions have changed places on the way.
        matrix: which one of a stack it is; None if it is the whole weight.
        chosen: a node that says which matrix of a stack each of several is; None if it is all of them, in their order.
        part: which part of the weight as stored, or of the matrix, it is; None if it is the whole.
        view: a node that is this part of the parameter and nothing else, if there is one.
    """

    key: int
    way: list[Any]
    swapped: bool
    matrix: int | None
    part: Part | None = None
    view: fx.Node | None = None
    chosen: fx.Node | None = None

    @property
    def base(self) -> fx.Node:
        """The parameter, or what this rank holds of it."""
        return self.way[0]  # type: ignore[no-any-return]

    @property
    def slot(self) -> Slot:
        """What its index is of."""
        return Slot(self.key, self.part)

    @property
    def size(self) -> tuple[Any, Any]:
        """Rows and columns of the matrix as stored that it is."""
        rows, cols = value(self.base).shape[-2:] if self.part is None else (self.part.rows, self.part.cols)
        return rows, cols


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
        """The sparse weight that ``node`` is, up to casts, transposes, the choice of one of a stack's matrices, and of
        a part."""
        found = _Way(node)
        key = self._keys.get(region.origin(before_local(found.source) or found.source))
        told = found.matrix, found.part, found.view, found.chosen
        return None if key is None else Operand(key, found.nodes, found.swapped, *told)

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

    def why_no_part(self, node: fx.Node, found: Operand) -> str | None:
        """Why a part of the weight, if the operand is one, has no index of its own, or None."""
        weight = self._context.weights[found.key]
        if found.part is None:
            return None
        if not found.part.rows * found.part.cols:
            return f"{describe(node)}: part of the weight without elements"
        if weight.stacked:
            return f"{describe(node)}: part of a matrix in a stack"
        here = weight.part is None and tuple(value(found.base).shape) == weight.shape
        if is_sharded(value(found.base)) or not here:
            return f"{describe(node)}: part of a weight that is spread over ranks"
        return None

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

    def index(self, region: Region, slot: Slot) -> fx.Node:
        """The placeholder of the index of a weight, or of a part, as a node of the region; made at the first use."""
        outermost = region
        while outermost.outer is not None:
            outermost = outermost.outer
        known = self._context.indices
        if slot not in known:
            weight, part = self._context.weights[slot.key], slot.part
            example = fake_index(weight, part, self._mode)
            called = f"mst_index_{slot.key}"
            if part is not None:
                called += f"_{part.row}_{part.col}_{part.rows}_{part.cols}"
                self._context.cut |= {slot.key} if is_cut(part, weight.grid) else set()
            node = add_placeholder(outermost.graph, called, example)
            # A static address at every call, as for parameters; and AOTAutograd reads the source of each input.
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node._dynamo_source = None  # type: ignore[attr-defined]
            known.append(slot)
        return region.receive(placeholders(outermost.graph)[known.index(slot) - len(known)])


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


def part_of(emit: Emitter, operand: Operand) -> fx.Node:
    """The part of a parameter that an operand is, as a view of it: the program's own where it has one, whose gradients
    come as the program's do."""
    part, whole = operand.part, value(operand.base)
    if part is None or operand.view is not None:
        return operand.base if operand.view is None else operand.view
    rows = emit("narrow", operand.base, 0, part.row, part.rows) if part.rows < whole.shape[0] else operand.base
    return emit("narrow", rows, 1, part.col, part.cols) if part.cols < whole.shape[1] else rows


def fake_index(weight: SparseWeight, part: Part | None, mode: Any) -> Tensor:
    """The index of a weight, or of a part of it, as Dynamo's graphs see it."""
    found = weight.index if part is None else range_of(weight, part).index
    assert found is not None
    return found if mode is None else mode.from_tensor(found, static_shapes=True)


def range_of(weight: SparseWeight, part: Part) -> Range:
    """A part of a weight that products take, which has an index from now on, where the weight's own is.

    Of a matrix that has an index and is here as a whole; the part has elements.
    """
    found = next((one for one in weight.ranges if one.part == part), None)
    if found is None:
        assert weight.index is not None
        with unset_fake_temporarily(), torch.inference_mode(False):  # also while a graph is compiled
            index = index_for(part.grid(weight.grid.block), weight.index.device)
            assert index is not None
            found = Range(part, index)
            weight.add_range(found)
    return found


def size_of(weight: SparseWeight, part: Part | None) -> tuple[int, int]:
    """How many elements of a weight, or of a part that products take, are in active blocks, and how many there are."""
    if part is None:
        return weight.active, weight.numel
    return range_of(weight, part).count(weight.mask, weight.grid.block, weight.changes), part.rows * part.cols


def erase_dead(node: Any) -> None:
    """Remove a chain of views of a weight that nobody uses any more."""
    while isinstance(node, fx.Node) and node.op != "placeholder" and not node.users:
        source = node.args[0]
        node.graph.erase_node(node)
        node = source


class _Way:
    """Transposes, casts and parts of a matrix, or of a stack of them, followed back from a node.

    Attributes: as those of :class:`Operand`, with ``nodes`` for its ``way``.
    """

    def __init__(self, node: Any) -> None:
        self.nodes, self.swapped = [node], False
        self.matrix: int | None = None
        self.part: Part | None = None
        self.view: fx.Node | None = None
        self.chosen: fx.Node | None = None
        self._all_before: Part | None = None  # what was cut off behind the views that follow the source
        while (source := self._before(self.nodes[0])) is not None:
            self.nodes.insert(0, source)
        if self.part is not None and (self.part.rows, self.part.cols) == tuple(value(self.source).shape[-2:]):
            self.part = None
        if self.part is None or self._all_before is not None:
            self.view = None

    @property
    def source(self) -> Any:
        return self.nodes[0]

    def _before(self, node: Any) -> fx.Node | None:
        """The node of which ``node`` was made in one of the ways that are followed."""
        source = before_swap(node)
        if source is not None and value(source).dim() > 3:
            return None
        if source is not None:
            self.swapped, self.view = not self.swapped, None
            self.part = None if self.part is None else turned(self.part)
            return source
        source = before_cast(node)
        if source is not None:
            self.view = None
            return source
        taken = before_part(node)
        if taken is not None:
            if self.view is None:
                self.view, self._all_before = node, self.part
            self.part = taken[1] if self.part is None else within(taken[1], self.part)
            return taken[0]
        source, matrix = before_selection(node)
        if source is not None and value(source).dim() == 3:
            self.matrix, self.view = matrix, None
            return source
        source, chosen = before_choice(node)
        if source is not None and self.chosen is None and self.matrix is None and self.part is None:
            self.chosen = chosen
            return source
        return None


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
    """Who uses a weight, one of a stack's matrices or a part of it, and that: the node and its user."""
    for user in node.users:
        if stacked and (calls(user, UNBINDS) or before_selection(user)[0] is not None):
            yield from _uses(user, calls(user, UNBINDS))
        elif parts := [] if stacked else _parts(user):
            for part in parts:
                yield from _uses(part, False)
        else:
            yield node, user


def _parts(node: fx.Node) -> list[fx.Node]:
    """The parts of a matrix that ``node`` is or leads to, as by what ``chunk`` returns; none where anything of it is or
    goes into something else."""
    if before_part(node) is not None:
        return [node]
    leading = [_parts(user) for user in node.users] if is_view(node) else []
    return [part for parts in leading for part in parts] if all(leading) else []


def multiplied_inputs(graph_module: fx.GraphModule) -> set[int]:
    """Positions of the inputs, matrices or of more dimensions, that products take as an operand."""
    inputs = {node: i for i, node in enumerate(placeholders(graph_module.graph))}
    found: set[int] = set()
    for region, node in walk(graph_module):
        for operand in node.all_input_nodes if calls(node, _PRODUCTS) else ():
            at = inputs.get(region.origin(_Way(operand).source))
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
