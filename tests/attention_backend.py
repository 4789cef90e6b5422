"""A torch.compile backend that applies the attention passes, and what its tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attention_models import Case
from oracles import assert_reordered
from torch import Tensor, fx, nn

from mst_compile.graph import multihead, passes
from mst_compile.graph.attention import causal, patterned
from mst_compile.graph.attention.constant import Constant
from mst_compile.graph.context import Context, Site
from mst_compile.rules.patterns import FULL, Parts

T = 12
SHAPE = (2, 3, T, 8)
SPARSE = Parts(window=3, first=5, step=5)
Compiled = Callable[..., Any]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Backend:
    """A backend that applies the passes and runs what comes out, eagerly unless told otherwise.

    Args:
        pattern: what attention shall see; None: it stays as the model wrote it.
    """

    def __init__(self, pattern: Parts | None = FULL, inner: str = "eager") -> None:
        self.pattern = pattern
        self.inner = torch._dynamo.lookup_backend(inner)
        self.graphs: list[fx.GraphModule] = []
        self.sites: list[Site] = []
        self.constants: list[Constant] = []
        self.expanded = 0

    def __call__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        context = Context(pattern=self.pattern)
        self.expanded += passes.apply((multihead.run,), graph_module, context)
        passes.apply((patterned.run, causal.run), graph_module, context)
        self.sites += context.sites
        self.constants += context.constants
        graph_module.graph.lint()
        self.graphs.append(graph_module)
        return self.inner(graph_module, list(inputs))

    def operators(self) -> list[fx.Node]:
        """The nodes of ``mst::attention``."""
        graphs = [m.graph for g in self.graphs for m in g.modules() if isinstance(m, fx.GraphModule)]
        return [n for graph in graphs for n in graph.nodes if n.target is torch.ops.mst.attention.default]

    def nodes(self) -> list[fx.Node]:
        return [n for graph_module in self.graphs for n in graph_module.graph.nodes]

    def reasons(self) -> list[str]:
        return [site.reason for site in self.sites if not site.replaced]


def compiled(function: Compiled, backend: Backend, dynamic: bool | None = None) -> Compiled:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=dynamic)


def assert_close(got: Tensor, want: Tensor, terms: int = 64) -> None:
    """Equal up to the order of summation of ``terms`` terms in a dozen layers."""
    assert_reordered(got, want, terms)


def training(case: Case, model: Compiled, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor | None]]:
    """The result and the gradients of one step."""
    got, loss = case.loss(model)
    return got.detach(), list(torch.autograd.grad(loss, parameters, allow_unused=True))


Trained = tuple[Tensor, list[Tensor | None]]


def assert_same(got: Trained, want: Trained) -> None:
    assert_close(got[0], want[0])
    scale = max(float(g.abs().max()) for g in want[1] if g is not None)
    for a, b in zip(got[1], want[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_reordered(a, b, 256, size=scale)


def assert_same_training(case: Case, backend: Backend) -> None:
    """The compiled model equals the model, gradients included."""
    parameters = list(case.model.parameters())
    assert_same(training(case, compiled(case.model, backend), parameters), training(case, case.model, parameters))


def tensors() -> list[Tensor]:
    return [torch.randn(SHAPE, requires_grad=True) for _ in range(3)]


def causal_mask() -> Tensor:
    position = torch.arange(T)
    return position[None] <= position[:, None]


def check_form(function: Attention, backend: Backend) -> None:
    """The compiled function equals the function, gradients included."""
    args = tensors()
    weights = torch.randn(function(*args).shape)
    want = function(*args)
    want_grads = torch.autograd.grad((want * weights).sum(), args)
    got = compiled(function, backend)(*args)
    assert_close(got, want)
    for a, b in zip(torch.autograd.grad((got * weights).sum(), args), want_grads, strict=True):
        assert_close(a, b, terms=256)
