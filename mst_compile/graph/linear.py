"""Find products with sparse weights in a Dynamo graph and rewrite them to ``mst::linear``.

The pass works on the graph that Dynamo hands to a backend, before AOTAutograd: there parameters are still inputs
that can be recognised, and ``einsum``, ``matmul`` and ``addmm`` still have their form. The packed index of each weight
enters as a placeholder after all others, so that a topology change is new data, never a new graph.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mst_compile.graph.notes import describe
from mst_compile.lowering import device
from mst_compile.state.weight import SparseWeight

_LINEARS = {torch.nn.functional.linear, torch._C._nn.linear}
_PRODUCTS = {torch.matmul, torch.mm, operator.matmul}
_CASTS = {"to", "float", "bfloat16", "half", "type_as", "contiguous"}
_CHECKPOINTS = {torch.ops.higher_order.tag_activation_checkpoint}


@dataclass
class Match:
    """``y = x @ W + bias``; ``weight`` leads to the parameter, ``rows_are_out`` if it enters as ``[out, in]``."""

    x: fx.Node
    weight: fx.Node
    rows_are_out: bool
    bias: fx.Node | None


def value(node: Any) -> Any:
    """The fake result that Dynamo recorded for a node."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None


def match(node: fx.Node) -> Match | None:
    """The product that ``node`` computes, if it has the form of a linear layer."""
    if node.op == "call_function" and node.target in _LINEARS:
        args = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
        return Match(args["input"], args["weight"], True, args.get("bias"))  # type: ignore[arg-type]
    if node.op == "call_function" and node.target is torch.addmm and not node.kwargs and len(node.args) == 3:
        bias, x, weight = node.args
        return Match(x, weight, False, bias)  # type: ignore[arg-type]
    product = (node.op == "call_function" and node.target in _PRODUCTS) or (
        node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__")
    )
    if product and len(node.args) == 2 and not node.kwargs:
        return Match(node.args[0], node.args[1], False, None)  # type: ignore[arg-type]
    if node.op == "call_function" and node.target in (torch.einsum, torch.functional.einsum):
        return _match_einsum(node)
    return None


def _match_einsum(node: fx.Node) -> Match | None:
    """``...k,nk->...n`` and ``...k,kn->...n``, whatever the letters."""
    if len(node.args) != 3 or not isinstance(node.args[0], str):
        return None
    operands, _, out = node.args[0].replace(" ", "").partition("->")
    x, _, w = operands.partition(",")
    if not out or len(w) != 2 or not x or x[-1] not in w or len(set(x.replace("...", ""))) != len(x.replace("...", "")):
        return None
    reduced = x[-1]
    feature = w.replace(reduced, "")
    if len(feature) != 1 or feature in x or out != x[:-1] + feature:
        return None
    return Match(node.args[1], node.args[2], w[1] == reduced, None)  # type: ignore[arg-type]


def strip_views(node: Any) -> tuple[Any, bool]:
    """Follow transposes and casts of a 2-D tensor back; returns (source, whether it enters transposed)."""
    transposed = False
    while isinstance(node, fx.Node):
        if _is_transpose(node):
            transposed = not transposed
        elif not (node.op == "call_method" and node.target in _CASTS):
            break
        node = node.args[0]
    return node, transposed


def _is_transpose(node: fx.Node) -> bool:
    tensor = value(node.args[0]) if node.args else None
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2:
        return False
    if node.op == "call_method" and node.target == "t":
        return True
    swaps = (node.op == "call_method" and node.target in ("transpose", "swapaxes", "permute")) or (
        node.op == "call_function" and node.target in (torch.transpose, torch.permute)
    )
    if swaps:
        dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
        ints = [d % 2 for d in dims if isinstance(d, int)]  # type: ignore[union-attr]
        permutes = node.target in ("permute", torch.permute)
        return ints == [1, 0] if permutes else sorted(ints) == [0, 1]
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    # torch 2.14 traces .T as aten.numpy_T
    return node.target is torch.t or str(node.target).split(".default")[0] in ("aten.numpy_T", "aten.mT", "aten.t")


class LinearPass:
    """Rewrites one graph. ``weights`` maps a key (the placeholder's position) to the sparse state of the parameter."""

    def __init__(self, weights: Mapping[int, SparseWeight], fake_mode: Any) -> None:
        self.weights = weights
        self.fake_mode = fake_mode
        self.reasons: dict[int, list[str]] = {}

    def run(self, graph_module: fx.GraphModule, sources: Mapping[fx.Node, int]) -> list[int]:
        """Rewrite in place; returns the keys of the index placeholders that were appended, in order.

        Args:
            sources: placeholder node of a sparse parameter -> its key.
        """
        graph = graph_module.graph
        index_of: dict[int, fx.Node] = {}
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _CHECKPOINTS:
                self._enter(graph_module, node, sources, index_of)
                continue
            found = match(node)
            if found is None:
                continue
            base, flipped = strip_views(found.weight)
            if base not in sources:
                continue
            key = sources[base]
            reason = self._why_not(node, found, self.weights[key])
            if reason is None:
                self._replace(graph, node, found, base, found.rows_are_out == flipped, key, index_of)
            else:
                self.reasons.setdefault(key, []).append(reason)
        self._report(sources)
        graph_module.recompile()
        return list(index_of)

    def _enter(
        self,
        graph_module: fx.GraphModule,
        node: fx.Node,
        sources: Mapping[fx.Node, int],
        index_of: dict[int, fx.Node],
    ) -> None:
        """Activation checkpointing: rewrite the body and thread the indices through the higher-order operator."""
        body = getattr(graph_module, str(node.args[0].target))  # type: ignore[union-attr]
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        inner = {i: sources[o] for i, o in zip(inputs, node.args[1:], strict=False) if o in sources}  # type: ignore[index]
        keys = self.run(body, inner)
        node.args = (*node.args, *(self._index(graph_module.graph, key, index_of) for key in keys))

    def _why_not(self, node: fx.Node, found: Match, weight: SparseWeight) -> str | None:
        out, x, w = value(node), value(found.x), value(strip_views(found.weight)[0])
        if not all(isinstance(v, torch.Tensor) for v in (out, x, w)):
            return f"{describe(node)}: its tensors are unknown"
        if weight.index is None:
            return "block 1: unstructured masks on dense products"
        return device.of(x.device.type).why_unsupported(out.dtype, w.dtype, weight.grid.block)

    def _index(self, graph: fx.Graph, key: int, index_of: dict[int, fx.Node]) -> fx.Node:
        """The placeholder of a weight's index, made at the first use, after all other placeholders."""
        if key not in index_of:
            last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
            with graph.inserting_after(last):
                node = graph.placeholder(f"mst_index_{key}")
            node.meta["example_value"] = fake_index(self.weights[key], self.fake_mode)
            # A static address at every call, as for parameters; and AOTAutograd reads the source of each input.
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node._dynamo_source = None  # type: ignore[attr-defined]
            index_of[key] = node
        return index_of[key]

    def _replace(
        self,
        graph: fx.Graph,
        node: fx.Node,
        found: Match,
        base: fx.Node,
        transposed: bool,
        key: int,
        index_of: dict[int, fx.Node],
    ) -> None:
        index = self._index(graph, key, index_of)
        out = value(node)
        bias, extra = found.bias, None
        if bias is not None and value(bias).dim() != 1:
            bias, extra = None, bias  # addmm adds any broadcastable tensor
        with graph.inserting_before(node):
            x = found.x if value(found.x).dtype == out.dtype else self._emit(graph, "to", found.x, out.dtype)
            block = self.weights[key].grid.block
            new = self._emit(graph, torch.ops.mst.linear.default, x, base, bias, index, block, transposed)
            if extra is not None:
                new = self._emit(graph, operator.add, new, extra)
        new.meta["example_value"] = out
        for name in ("nn_module_stack", "source_fn_stack", "stack_trace"):
            if name in node.meta:
                new.meta[name] = node.meta[name]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        _erase_dead(graph, found.weight)
        self.weights[key].uses.matched += 1

    def _emit(self, graph: fx.Graph, target: str | Callable[..., Any], *args: Any) -> fx.Node:
        """A node with the fake result that AOTAutograd's cache asks every node for."""
        node = graph.call_method(target, args) if isinstance(target, str) else graph.call_function(target, args)
        values = fx.node.map_arg(args, value)
        with self.fake_mode or contextlib.nullcontext(), torch.no_grad():
            function = getattr(values[0], target) if isinstance(target, str) else target
            node.meta["example_value"] = function(*values[1:]) if isinstance(target, str) else function(*values)
        return node

    def _report(self, sources: Mapping[fx.Node, int]) -> None:
        """Note every use of a sparse weight that stays dense."""
        for node, key in sources.items():
            uses = self.weights[key].uses
            for user in node.users:
                if user.target is not torch.ops.mst.linear.default and user.target not in _CHECKPOINTS:
                    self.reasons.setdefault(key, [f"used by {describe(user)}"])
            for reason in self.reasons.get(key, []):
                if reason not in uses.unmatched:
                    uses.unmatched.append(reason)


def fake_index(weight: SparseWeight, fake_mode: Any) -> torch.Tensor:
    """The weight's index as Dynamo's graphs see it."""
    assert weight.index is not None
    return weight.index if fake_mode is None else fake_mode.from_tensor(weight.index, static_shapes=True)


def _erase_dead(graph: fx.Graph, node: Any) -> None:
    """Remove a chain of views of a weight that nobody uses any more."""
    while isinstance(node, fx.Node) and node.op != "placeholder" and not node.users:
        source = node.args[0]
        graph.erase_node(node)
        node = source
