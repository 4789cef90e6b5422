"""Run slices of a graph on real tensors.

Constants and buffers are as they are, integer inputs of two dimensions (padding masks) at chosen values, symbolic sizes
at their hints and at other sizes. Names play no part; what cannot run on its own is not known.

Buffers enter a graph as inputs, and Dynamo does not guard their values: :class:`Constant` tells at run time whether a
buffer still holds what was relied on.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from mst_compile.graph.linear import value

_MAX_NODES = 300
MAX_ELEMENTS = 1 << 27
_NO_VALUE = object()
# These read the shape of their first argument, not its numbers.
_SHAPE_METHODS = {"size", "dim", "new_ones", "new_zeros", "new_full", "new_empty", "new_tensor"}
_SHAPE_FUNCTIONS = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like}
_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
}  # fmt: skip


class UnknownError(Exception):
    """A value that cannot be computed without the graph's inputs; the message says why."""


class Constant:
    """A buffer whose value a rewrite relies on: ``position`` among the graph's placeholders, and the value."""

    def __init__(self, position: int, buffer: Tensor) -> None:
        self.position = position
        self._value = buffer.detach().cpu().clone()
        self._versions = WeakIdKeyDictionary()  # other modules may share the graph, each with a buffer of its own
        self._versions[buffer] = buffer._version

    def holds(self, buffer: Tensor) -> bool:
        """Whether this input has the value that was relied on; compares numbers only where it was written to."""
        if self._versions.get(buffer) != buffer._version:
            same = buffer.shape == self._value.shape and buffer.dtype == self._value.dtype
            if not same or not torch.equal(buffer.detach().cpu(), self._value):
                return False
            self._versions[buffer] = buffer._version
        return True


@dataclass(frozen=True)
class Product:
    """Scores that enter a mask: ``node`` holds ``alpha q k^T + beta extra``; ``pointwise`` up to the softmax."""

    node: fx.Node
    alpha: float = 1.0
    beta: float = 0.0
    extra: fx.Node | None = None
    pointwise: bool = False


class Evaluator:
    """Runs slices of one graph.

    Args:
        inputs: whether buffers, padding masks and sizes among the placeholders may be used; else only constants.
        outer: for the body of a higher-order operator: the evaluator of the graph around it, and where each of the
            body's placeholders comes from.
        actual: what the placeholders stand for, if that is known; Dynamo forgets it when the backend returns.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: bool = True,
        outer: tuple[Evaluator, Mapping[fx.Node, fx.Node]] | None = None,
        actual: Sequence[Any] = (),
    ) -> None:
        self._module = graph_module
        self._inputs = inputs
        self._outer = outer
        self.placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        self._actual = dict(zip(self.placeholders, actual, strict=False))
        self.relied: dict[fx.Node, Tensor] = {}
        self._mutators: dict[int, list[fx.Node]] = {}
        for node in graph_module.graph.nodes:
            key = _storage(_mutated(node))
            if key is not None:
                self._mutators.setdefault(key, []).append(node)
        self.hints: dict[Any, int] = {} if outer is None else dict(outer[0].hints)
        for node in self.placeholders:
            size = value(node)
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.has_hint():
                self.hints[size.node.expr] = int(size.node.hint)
        self._sizes = self.hints

    def sizes(self) -> list[dict[Any, int]]:
        """Values of the symbolic sizes: their hints, and others nearby."""
        if not self.hints:
            return [{}]
        return [self.hints, {symbol: n - 1 if n > 2 else n + 1 for symbol, n in self.hints.items()}]

    def assignments(self, node: fx.Node, given: Mapping[fx.Node, Any], at: fx.Node) -> list[dict[Any, int]]:
        """Values of the symbolic sizes at which a claim about a node, a square matrix, has to hold.

        Besides the hints and other sizes nearby, one that exceeds all numbers in the node's slice: a window of 4096
        keys shows at no length below.
        """
        found = self.sizes()
        if len(found) == 1:
            return found
        length = value(node).shape[-1]
        numbers = list(self.hints.values())  # attributes of a module may be symbolic too
        for n in self._slice(node, given, {}, at):
            fx.node.map_aggregate((n.args, n.kwargs), lambda a: numbers.append(abs(a)) if type(a) is int else None)
        longest = max(numbers, default=0)
        if isinstance(length, torch.SymInt) and longest >= self.concrete(length):
            if not length.node.expr.is_Symbol:
                raise UnknownError("its mask may change at other lengths")
            found.append(found[1] | {length.node.expr: longest + 2})
        return found

    def use(self, sizes: dict[Any, int]) -> None:
        """Evaluate at these values of the symbolic sizes from now on."""
        self._sizes = sizes
        if self._outer is not None:
            self._outer[0].use(sizes)

    def concrete(self, item: Any) -> Any:
        """A size, or a tuple of sizes, as numbers."""
        if isinstance(item, tuple | list):
            return torch.Size([self.concrete(i) for i in item])
        if isinstance(item, torch.SymInt):
            number = item.node.expr.xreplace({symbol: sympy.Integer(n) for symbol, n in self._sizes.items()})
            if not number.is_number:
                raise UnknownError("its mask has a size that depends on data")
            return int(number)
        return float(item) if isinstance(item, torch.SymFloat) else item

    def padding(self, node: fx.Node, product: Product | None = None, at: fx.Node | None = None) -> set[fx.Node]:
        """The integer or bool inputs of two dimensions that a node depends on, other than by way of ``product``.

        For the body of an operator they may be those of the graph around it.
        """
        given = {} if product is None else {product.node: None}
        nodes = self._slice(node, given, {}, at)
        if product is not None and product.extra is not None and product.beta:
            nodes += self._slice(product.extra, {}, {}, product.node)
        found: set[fx.Node] = set()
        for n in nodes:
            if self._outer is not None and n in self._outer[1]:
                found |= self._outer[0].padding(self._outer[1][n])
            elif n.op == "placeholder" and is_padding(n):
                found.add(n)
        return found

    @torch.no_grad()
    def evaluate(self, node: fx.Node, given: Mapping[fx.Node, Any], at: fx.Node | None = None) -> Tensor:
        """The value of a node as ``at`` reads it, with some nodes' values given; raises UnknownError."""
        values: dict[fx.Node, Any] = {}
        try:
            # Outside of Dynamo's fake mode: these are real, small tensors. Should one be random, the user's generator
            # must not notice. Autocast would be the caller's, not the graph's.
            with (
                torch._subclasses.fake_tensor.unset_fake_temporarily(),
                torch.random.fork_rng(devices=[]),
                torch.autocast("cpu", enabled=False),
            ):
                self._run(self._slice(node, given, values, at), node, values)
        except UnknownError:
            raise
        except Exception as error:
            raise UnknownError("its mask cannot be computed on its own") from error
        result = values[node]
        if not isinstance(result, Tensor):
            raise UnknownError("its mask is no tensor")
        return result

    def _run(self, order: list[fx.Node], last: fx.Node, values: dict[fx.Node, Any]) -> None:
        uses = Counter(i for n in order for i in n.all_input_nodes)
        for n in order:
            if n not in values:
                args = [values[a] if isinstance(a, fx.Node) else fx.node.map_arg(a, values.get) for a in n.args]
                kwargs = {k: fx.node.map_arg(a, values.get) for k, a in n.kwargs.items()}
                if _reads_shape(n):
                    args[0] = self._stand_in(n.args[0]) if args[0] is None else args[0]
                args = [_to_cpu(a) for a in args]
                kwargs = {k: _to_cpu(a) for k, a in kwargs.items()}
                function: Any = getattr(type(args[0]), str(n.target)) if n.op == "call_method" else n.target
                values[n] = _to_cpu(function(*args, **kwargs))
                if isinstance(values[n], Tensor) and values[n].numel() > MAX_ELEMENTS:
                    raise UnknownError("its mask is too large to compute")
            for i in n.all_input_nodes:
                uses[i] -= 1
                if not uses[i] and i is not last:
                    values[i] = None  # a mask of every sequence of a batch is large: hold no more than needed

    def _stand_in(self, node: Any) -> Tensor:
        example = value(node)
        return torch.empty(self.concrete(tuple(example.shape)), dtype=example.dtype)

    def version(self, nodes: Iterable[fx.Node], at: fx.Node) -> tuple[int, ...]:
        """How often each node's memory was written to before ``at``."""
        order = {n: i for i, n in enumerate(self._module.graph.nodes)}
        return tuple(
            sum(order.get(writer, -1) < order[at] for writer in self._mutators.get(_storage(n) or 0, ())) for n in nodes
        )

    def _slice(
        self, node: fx.Node, given: Mapping[fx.Node, Any], values: dict[fx.Node, Any], at: fx.Node | None
    ) -> list[fx.Node]:
        """What ``node`` depends on as ``at`` reads it, in executable order; ``values`` receives the leaves'."""
        found: set[fx.Node] = set()
        stack, order = [node], list(self._module.graph.nodes)
        before = {n: i for i, n in enumerate(order)}
        limit = before[node if at is None else at]
        while stack:
            n = stack.pop()
            if n in found:
                continue
            found.add(n)
            if len(found) > _MAX_NODES:
                raise UnknownError("its mask takes too many steps to compute")
            leaf = self._leaf(n, given)
            if leaf is not _NO_VALUE:
                values[n] = leaf
            elif n.op not in ("call_function", "call_method"):
                raise UnknownError("its mask depends on an input or a parameter")
            else:
                first = n.args[0] if _reads_shape(n) else None
                stack.extend(i for i in n.all_input_nodes if i is not first)
            for writer in self._mutators.get(_storage(n) or 0, ()):
                if n.op in ("placeholder", "get_attr") and n not in given:
                    raise UnknownError("its mask depends on a buffer that is written to")
                if before.get(writer, limit) < limit:
                    stack.append(writer)
        return [n for n in order if n in found]

    def _leaf(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
        """The value of a node that is not computed from others, or _NO_VALUE."""
        if node in given:
            return given[node]
        example = value(node)
        if isinstance(example, int | float | torch.SymInt | torch.SymFloat | torch.Size):
            return self.concrete(example)
        if node.op == "get_attr":
            constant = operator.attrgetter(str(node.target))(self._module)
            if isinstance(constant, Tensor) and not constant.requires_grad:
                return constant.detach().cpu().clone()
        if node.op != "placeholder" or not self._inputs:
            return _NO_VALUE
        if self._outer is not None and node in self._outer[1]:
            return self._outer[0].evaluate(self._outer[1][node], given)
        buffer = _buffer(node, self._actual.get(node))
        if buffer is not None:
            self.relied[node] = buffer
            return buffer.detach().cpu().clone()
        if is_padding(node):
            return torch.ones(self.concrete(tuple(example.shape)), dtype=example.dtype)
        return _NO_VALUE


def _buffer(node: fx.Node, tensor: Any) -> Tensor | None:
    """The real tensor of a placeholder that is a module's buffer."""
    if (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is None:
        return None
    if tensor is None:
        with contextlib.suppress(Exception):
            tensor = node.meta["grapharg"].example
    fake = isinstance(tensor, torch._subclasses.FakeTensor)
    usable = isinstance(tensor, Tensor) and not isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
    return tensor if usable and not fake else None


def is_padding(node: fx.Node) -> bool:
    tensor = value(node)
    if (
        not isinstance(tensor, Tensor)
        or tensor.dim() != 2
        or (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    ):
        return False
    return not tensor.is_floating_point() and not tensor.is_complex()


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_function" and node.target in _SHAPE_FUNCTIONS


def _mutated(node: fx.Node) -> Any:
    """The node that an in-place operation writes to."""
    if node.kwargs.get("out") is not None:
        return node.kwargs["out"]
    if not node.args or node.op not in ("call_function", "call_method"):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    written = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    return node.args[0] if written or node.target in _IN_PLACE or node.kwargs.get("inplace") is True else None


def _storage(node: Any) -> int | None:
    """What identifies the memory of a node's fake tensor; views share it."""
    tensor = value(node)
    if not isinstance(tensor, Tensor):
        return None
    try:
        return tensor.untyped_storage()._cdata
    except Exception:
        return None  # a tensor subclass without memory of its own


def _to_cpu(item: Any) -> Any:
    return torch.device("cpu") if isinstance(item, torch.device) else item
