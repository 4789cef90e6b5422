"""Run slices of a graph on real tensors.

Constants and buffers are as they are, integer inputs of two dimensions (padding masks) at chosen values, symbolic sizes
at their hints and at other sizes. Names play no part; what cannot run on its own is not known.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from mst_compile.graph.attention.found import Product
from mst_compile.graph.fx import Region, computes, placeholders, storage, value, written

_MAX_NODES = 300
MAX_ELEMENTS = 1 << 27
_NO_VALUE = object()
# These read the shape of their first argument, not its numbers.
_SHAPE_METHODS = {"size", "dim", "new_ones", "new_zeros", "new_full", "new_empty", "new_tensor"}
_SHAPE_FUNCTIONS = {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like}


VARIES = "or the scale of its scores is a number that may differ from call to call"


class UnknownError(Exception):
    """A value that cannot be computed without the graph's inputs; the message says why."""


class Evaluator:
    """Runs slices of one graph.

    Args:
        inputs: whether buffers and padding masks among the placeholders may be used; else only constants.
        outer: for the body of a checkpoint: the evaluator of the graph around it.
        actual: what the placeholders stand for, if that is known; Dynamo forgets it when the backend returns.

    ``relied`` holds the buffers that were read so far.
    """

    def __init__(
        self, region: Region, inputs: bool = True, outer: Evaluator | None = None, actual: Sequence[Any] = ()
    ) -> None:
        self._region = region
        self._inputs = inputs
        self._outer = outer
        self.placeholders = placeholders(region.graph)
        self._actual = dict(zip(self.placeholders, actual, strict=False))
        self.relied: dict[fx.Node, Tensor] = {}
        self._mutators: dict[int, list[fx.Node]] = {}
        for node in region.graph.nodes:
            for key in {key for n in written(node) if (key := storage(n)) is not None}:
                self._mutators.setdefault(key, []).append(node)
        self.hints: dict[Any, int] = {} if outer is None else dict(outer.hints)
        for node in self.placeholders:
            size = value(node)
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.has_hint():
                self.hints[size.node.expr] = int(cast(int, size.node.hint))
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
            self._outer.use(sizes)

    def concrete(self, item: Any) -> Any:
        """A size, or a number made of sizes, or a tuple of sizes, as numbers."""
        if isinstance(item, tuple | list):
            return torch.Size([self.concrete(i) for i in item])
        if not isinstance(item, torch.SymInt | torch.SymFloat):
            return item
        number = item.node.expr.xreplace({symbol: sympy.Integer(n) for symbol, n in self._sizes.items()})
        if isinstance(item, torch.SymFloat) and not (item.node.expr.free_symbols & self._sizes.keys()):
            # As long as Dynamo is at work it guards on what it is asked for; afterwards nobody would.
            environment: Any = item.node.shape_env
            number = number if number.is_number or environment.frozen else sympy.Float(float(item))
        if not number.is_number:
            size = "has a size that depends on data" if isinstance(item, torch.SymInt) else VARIES
            raise UnknownError(f"its mask {size}")
        return int(number) if isinstance(item, torch.SymInt) else float(number)

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
            if self._outer is not None and n in self._region.sources:
                found |= self._outer.padding(self._region.sources[n])
            elif n.op == "placeholder" and is_padding(n):
                found.add(n)
        return found

    @torch.no_grad()
    def evaluate(self, node: fx.Node, given: Mapping[fx.Node, Any], at: fx.Node | None = None) -> Tensor:
        """The value of a node as ``at`` reads it, with some nodes' values given; raises UnknownError."""
        leaves: dict[fx.Node, Any] = {}
        try:
            # Outside of Dynamo's fake mode: these are real, small tensors. Should one be random, the user's generator
            # must not notice. Autocast would be the caller's, not the graph's.
            with (
                torch._subclasses.fake_tensor.unset_fake_temporarily(),
                torch.random.fork_rng(devices=[]),
                torch.autocast("cpu", enabled=False),
            ):
                order = self._slice(node, given, leaves, at)
                result = _Slice(self, order, node, leaves).run()
        except UnknownError:
            raise
        except Exception as error:
            raise UnknownError("its mask cannot be computed on its own") from error
        if not isinstance(result, Tensor):
            raise UnknownError("its mask is no tensor")
        return result

    def version(self, nodes: Iterable[fx.Node], at: fx.Node) -> tuple[int, ...]:
        """How often each node's memory was written to before ``at``."""
        order = {n: i for i, n in enumerate(self._region.graph.nodes)}
        return tuple(
            sum(order.get(writer, -1) < order[at] for writer in self._mutators.get(storage(n) or 0, ())) for n in nodes
        )

    def _slice(
        self, node: fx.Node, given: Mapping[fx.Node, Any], values: dict[fx.Node, Any], at: fx.Node | None
    ) -> list[fx.Node]:
        """What ``node`` depends on as ``at`` reads it, in executable order; ``values`` receives the leaves'."""
        found: set[fx.Node] = set()
        stack, order = [node], list(self._region.graph.nodes)
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
            elif not computes(n):
                raise UnknownError("its mask depends on an input or a parameter")
            else:
                first = n.args[0] if _reads_shape(n) else None
                stack.extend(i for i in n.all_input_nodes if i is not first)
            for writer in self._mutators.get(storage(n) or 0, ()):
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
            constant = operator.attrgetter(str(node.target))(self._region.module)
            if isinstance(constant, Tensor) and not constant.requires_grad:
                return constant.detach().cpu().clone()
        if self._outer is not None and node in self._region.sources:
            return self._outer.evaluate(self._region.sources[node], given)
        if node.op != "placeholder" or not self._inputs:
            return _NO_VALUE
        buffer = _buffer(node, self._actual.get(node))
        if buffer is not None:
            self.relied[node] = buffer
            return buffer.detach().cpu().clone()
        if is_padding(node):
            return torch.ones(self.concrete(tuple(example.shape)), dtype=example.dtype, device="cpu")
        return _NO_VALUE


class Evaluators(dict[Region, Evaluator]):
    """The evaluator of each region of a graph, made when it is asked for; arguments as for :class:`Evaluator`."""

    def __init__(self, inputs: bool = True, actual: Sequence[Any] = ()) -> None:
        super().__init__()
        self._inputs, self._actual = inputs, actual

    def __missing__(self, region: Region) -> Evaluator:
        outer, actual = (None, self._actual) if region.outer is None else (self[region.outer], ())
        self[region] = Evaluator(region, self._inputs, outer, actual)
        return self[region]


class _Slice(fx.Interpreter):
    """Runs some nodes of a graph, in their order, on the CPU.

    A mask of every sequence of a batch is large: no value is held longer than needed, which the interpreter sees to.

    Args:
        leaves: values of the nodes that are not computed; used up.
    """

    def __init__(
        self, evaluator: Evaluator, order: Iterable[fx.Node], result: fx.Node, leaves: dict[fx.Node, Any]
    ) -> None:
        self._concrete = evaluator.concrete
        self._given: dict[str, Callable[[], Any]] = {}
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}

        def copy_of(node: fx.Node) -> fx.Node:
            if node not in copies:  # only its shape is read
                return self._leaf(graph, node, functools.partial(self._stand_in, node))
            return copies[node]

        for node in order:
            if node in leaves:
                copies[node] = self._leaf(graph, node, functools.partial(_same, leaves.pop(node)))
            else:
                copies[node] = graph.node_copy(node, copy_of)
        graph.output(copies[result])
        super().__init__(torch.nn.Module(), graph=graph)
        self.extra_traceback = False

    def _leaf(self, graph: fx.Graph, node: fx.Node, make: Callable[[], Any]) -> fx.Node:
        leaf = graph.placeholder(node.name)
        self._given[leaf.name] = make
        return leaf

    def _stand_in(self, node: fx.Node) -> Tensor:
        example = value(node)
        return torch.empty(self._concrete(tuple(example.shape)), dtype=example.dtype, device="cpu")

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return self._given.pop(n.name)()
        result = _to_cpu(super().run_node(n))
        if isinstance(result, Tensor) and result.numel() > MAX_ELEMENTS:
            raise UnknownError("its mask is too large to compute")
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_to_cpu, args)), {k: _to_cpu(a) for k, a in kwargs.items()}


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


def _same(item: Any) -> Any:
    return item


def _to_cpu(item: Any) -> Any:
    return torch.device("cpu") if isinstance(item, torch.device) else item
