"""What is known of an attention that a form has found, on its way to being replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mst_compile.graph.fx import value


@dataclass(frozen=True)
class Product:
    """Scores that enter a mask: ``node`` holds ``alpha q k^T + beta extra``; ``pointwise`` up to the softmax.

    ``alpha`` and ``beta`` are None if they may differ from call to call.
    """

    node: fx.Node
    alpha: float | None = 1.0
    beta: float | None = 0.0
    extra: fx.Node | None = None
    pointwise: bool = False


@dataclass
class Attention:
    """An attention in a graph, ``softmax(scale q k^T, masked) v``; what a form finds.

    Attributes:
        form: name of the form, for the report.
        out: the node that holds its result.
        q, k, v: ``[batch, heads, length, head size]``, or without heads; None if ``reason`` says why it stays.
        causal: it is causal without a mask.
        mask: the node whose value says which keys are seen: bool "keep" or added to the scores; with ``product``, the
            scores as they enter the softmax, masked and scaled.
        reader: the node that reads ``mask``, if not ``out``.
        product: the product of queries and keys, where it stands in the graph.
        scale: of the scores; None is one over the root of the head size. With ``product`` it is found out.
        dropout: rates at which its weights drop out.
        flipped: whether ``k`` is ``[..., head size, length]``.
        grouped: whether several heads of ``q`` may share one of ``k``.
        inner: nodes that nothing else needs, in order, of which ``product`` is the first.
        reason: why it must stay as it is, as far as its form tells.
        padding: found out: the input ``[batch, length]`` that is not 0 for keys that may be seen; with ``hides``, for
            the others.
    """

    form: str
    out: fx.Node
    q: Any = None
    k: Any = None
    v: Any = None
    causal: bool = False
    mask: fx.Node | None = None
    reader: fx.Node | None = None
    product: Product | None = None
    scale: Any = None
    dropout: list[Any] = field(default_factory=list)
    flipped: bool = False
    grouped: bool = False
    inner: list[fx.Node] = field(default_factory=list)
    reason: str | None = None
    padding: fx.Node | None = None
    hides: bool = False

    def alike(self) -> Any:
        """Equal for attentions of one graph that treat their scores alike: what is found out of one holds for all."""
        if self.product is None:
            return self.mask
        number = {n: i for i, n in enumerate(self.inner)}

        def numbered(item: Any) -> Any:
            return ("inner", number[item]) if item in number else item

        steps = [(n.target, repr(fx.node.map_arg((n.args, n.kwargs), numbered))) for n in self.inner[1:]]
        p = self.product
        return str(value(p.node).shape), p.alpha, p.beta, p.extra, p.pointwise, str(steps)

    def outside(self) -> list[fx.Node]:
        """The nodes that decide on the mask from outside."""
        if self.product is None:
            return [] if self.mask is None else [self.mask]
        return [i for n in self.inner[1:] for i in n.all_input_nodes if i not in self.inner]
