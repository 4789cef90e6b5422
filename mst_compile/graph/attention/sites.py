"""Give attention its causality back, and its pattern.

Models that build an explicit causal mask hand ``scaled_dot_product_attention`` a dense mask, and its kernels then do
twice the work. :func:`recover_causal` executes masks that depend on no input of the graph; one that comes out causal is
replaced by ``is_causal=True``. Masked entries had a weight of exactly 0 before, so nothing changes but the time.

:class:`AttentionPass` finds causal self-attention in whatever form and rewrites it to ``mst::attention`` with a sparse
pattern. Names play no part; what is not understood stays as it was, and a :class:`Site` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mst_compile.graph.attention.causality import Finding, find
from mst_compile.graph.attention.evaluate import Constant, Evaluator, UnknownError
from mst_compile.graph.attention.rewrite import Attention, replace, why_not
from mst_compile.graph.attention.softmax import Chain, dataflow, find_chain, is_softmax
from mst_compile.graph.linear import value
from mst_compile.graph.multihead import is_multihead, why_opaque
from mst_compile.rules.patterns import FULL, Parts

_ATTENTION = torch._C._nn.scaled_dot_product_attention
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_CHECKPOINTS = {torch.ops.higher_order.tag_activation_checkpoint}


def recover_causal(graph_module: fx.GraphModule) -> int:
    """Replace constant causal masks in place; returns how many attentions changed."""
    known: dict[Any, bool] = {}
    changed = 0
    evaluator: Evaluator | None = None
    for node in graph_module.graph.nodes:
        if not _is_attention(node):
            continue
        arguments = _arguments(node)
        mask = arguments.get("attn_mask")
        if not isinstance(mask, fx.Node) or arguments.get("is_causal"):
            continue
        evaluator = evaluator or Evaluator(graph_module, inputs=False)
        key = (mask, evaluator.version([mask], node))
        if key not in known:
            known[key] = _is_constant_causal(evaluator, mask, node)
        if known[key]:
            arguments["attn_mask"], arguments["is_causal"] = None, True
            node.args, node.kwargs = (), arguments
            changed += 1
    if changed:
        graph_module.recompile()
    return changed


def _is_constant_causal(evaluator: Evaluator, mask: fx.Node, at: fx.Node) -> bool:
    try:
        for sizes in evaluator.assignments(mask, {}, at):
            evaluator.use(sizes)
            if not is_causal(evaluator.evaluate(mask, {}, at)):
                return False
    except UnknownError:
        return False  # whatever cannot run on its own stays as it was
    return True


def is_causal(mask: Tensor) -> bool:
    """Whether ``mask`` (bool "keep", or additive) keeps exactly the keys up to the query, in every batch and head."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    if mask.dtype == torch.bool:
        keep = mask
    elif mask.is_floating_point():
        keep = mask == 0
        # exp() of anything below this is exactly 0 next to the diagonal's finite score
        if not bool((keep | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return False
    else:
        return False
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((keep == causal).all())


@dataclass(frozen=True)
class Site:
    """One attention of a graph.

    Attributes:
        where: path of the module it stands in.
        form: ``"sdpa"``, ``"manual"`` (written out with a softmax) or ``"multihead"`` (not written out).
        causal: whether it is causal self-attention that the pass understands.
        replaced: whether it runs on ``mst::attention`` now.
        reason: why not, else empty.
        query: if replaced, shape of the queries ``[..., length, head size]``; sizes may be symbolic.
    """

    where: str
    form: str
    causal: bool
    replaced: bool
    reason: str
    query: tuple[Any, ...] = ()


class AttentionPass:
    """Rewrites the attention of one graph to ``mst::attention``.

    Args:
        parts: which keys a query shall see; with ``FULL`` the model's own kernels stay.
        force: use the operator with ``FULL`` too.
        why_unsupported: given device type, dtype and head size, why there is no kernel, or None: what would run on the
            operator's reference stays with the model's own kernels.

    After :meth:`run`, ``constants`` holds the buffers that the rewritten graph relies on.
    """

    def __init__(
        self,
        parts: Parts,
        fake_mode: Any,
        force: bool = False,
        why_unsupported: Callable[[str, torch.dtype, int], str | None] | None = None,
    ) -> None:
        self.parts = parts
        self.fake_mode = fake_mode
        self.why_unsupported = why_unsupported
        self.rewrites = force or parts != FULL
        self.sites: list[Site] = []
        self.constants: list[Constant] = []
        self._known: dict[Any, Finding] = {}
        self._bodies: dict[fx.Graph, tuple[fx.Node, dict[fx.Node, fx.Node]]] = {}

    def run(self, graph_module: fx.GraphModule, inputs: Sequence[Any] = ()) -> list[Site]:
        """Rewrite in place.

        Args:
            inputs: the graph's real inputs; needed for masks in buffers once Dynamo has forgotten its own.
        """
        evaluator = Evaluator(graph_module, actual=inputs)
        self._visit(graph_module, evaluator)
        recover_causal(graph_module)
        position = {n: i for i, n in enumerate(evaluator.placeholders)}
        self.constants = [Constant(position[n], buffer) for n, buffer in evaluator.relied.items()]
        return self.sites

    def _visit(self, graph_module: fx.GraphModule, evaluator: Evaluator) -> None:
        self._known.clear()
        flow = dataflow(graph_module.graph)
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function" and node.target in _CHECKPOINTS:
                self._enter(graph_module, node, evaluator)
            elif is_multihead(node):
                self._note(node, "multihead", why_opaque(node) or "it was not written out", False)
            elif _is_attention(node):
                self._sdpa(node, evaluator)
            elif is_softmax(node) and node in flow:
                chain = find_chain(flow, node)
                if chain is not None:
                    self._chain(chain, evaluator)
        graph_module.recompile()

    def _enter(self, graph_module: fx.GraphModule, node: fx.Node, evaluator: Evaluator) -> None:
        """Activation checkpointing: rewrite the body; its masks often come from outside."""
        body = getattr(graph_module, str(node.args[0].target))  # type: ignore[union-attr]
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        sources: Mapping[fx.Node, fx.Node] = {
            i: o for i, o in zip(inputs, node.args[1:], strict=False) if isinstance(o, fx.Node)
        }
        self._bodies[body.graph] = node, {}
        self._visit(body, Evaluator(body, outer=(evaluator, sources)))
        self._known.clear()

    def _note(self, node: fx.Node, form: str, reason: str | None, causal: bool, query: tuple[Any, ...] = ()) -> None:
        stack = node.meta.get("nn_module_stack")
        where = next(reversed(stack.values()))[0] if stack else ""
        self.sites.append(Site(where, form, causal, bool(query), reason or "", query))

    def _why_not(self, found: Attention) -> str | None:
        reason = why_not(found)
        if reason is None and self.why_unsupported is not None:
            out = value(found.out)
            reason = self.why_unsupported(out.device.type, out.dtype, value(found.q).shape[-1])
        return reason

    def _sdpa(self, node: fx.Node, evaluator: Evaluator) -> None:
        given = _arguments(node)
        mask = given.get("attn_mask")
        q, k, v = given["query"], given["key"], given["value"]
        found = Attention("sdpa", node, q, k, v, given.get("scale"), grouped=bool(given.get("enable_gqa")))
        reason = _dropout_reason([given.get("dropout_p", 0.0)]) or self._why_not(found)
        if reason is None and mask is not None:
            finding = self._finding((mask, evaluator.version([mask], node)), evaluator, mask, node)
            reason, found.padding, found.hides = finding.reason, finding.padding, finding.hides
        elif reason is None and given.get("is_causal", False) is not True:
            reason = "it is not causal"
        self._finish(found, reason, evaluator)

    def _chain(self, chain: Chain, evaluator: Evaluator) -> None:
        k, flipped = _straight(chain.k_transposed)
        found = Attention("manual", chain.out, chain.q, k, chain.v, flipped=flipped, inner=chain.inner)
        reason = chain.reason or _dropout_reason(chain.dropout) or self._why_not(found)
        if reason is None:
            outside = {i: None for n in chain.inner[1:] for i in n.all_input_nodes if i not in chain.inner}
            key = (chain.signature(), evaluator.version(outside, chain.softmax))
            finding = self._finding(key, evaluator, chain.entering, chain.softmax, chain.product)
            reason, found.padding, found.hides = finding.reason, finding.padding, finding.hides
            found.scale = finding.scale
        self._finish(found, reason, evaluator)

    def _finding(self, key: Any, evaluator: Evaluator, *what: Any) -> Finding:
        if key not in self._known:
            self._known[key] = find(evaluator, *what)
        return self._known[key]

    def _finish(self, found: Attention, reason: str | None, evaluator: Evaluator) -> None:
        reason = reason or self._why_not(found)
        if reason is None and found.padding is not None and found.padding.graph is not found.out.graph:
            call, _ = self._bodies[found.out.graph]
            reason = None if found.padding.graph is call.graph else "its padding comes from outside of two checkpoints"
        causal = reason is None
        if causal and not self.rewrites:
            reason = "the pattern is full"
        query = () if reason is not None else tuple(value(found.q).shape)
        self._note(found.out, found.form, reason, causal, query)
        if reason is None:
            found.padding = self._inside(found)
            replace(found, self.parts, evaluator, self.fake_mode)

    def _inside(self, found: Attention) -> fx.Node | None:
        """The padding as a node of the attention's own graph: a checkpoint's body receives it as one more input."""
        graph, padding = found.out.graph, found.padding
        if padding is None or padding.graph is graph:
            return padding
        call, made = self._bodies[graph]
        if padding not in made:
            last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
            with graph.inserting_after(last):
                made[padding] = graph.placeholder(f"mst_{padding.name}")
            made[padding].meta["example_value"] = value(padding)
            call.args = (*call.args, padding)
        return made[padding]


def _is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is _ATTENTION


def _arguments(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)


def _dropout_reason(rates: list[Any]) -> str | None:
    for rate in rates:
        number = value(rate) if isinstance(rate, fx.Node) else rate
        if not isinstance(number, int | float | torch.SymFloat) or not bool(number == 0):
            return f"its weights drop out at a rate of {number}"
    return None


def _straight(k_transposed: fx.Node) -> tuple[fx.Node, bool]:
    """Keys as they were before they were transposed for the product, or the same node and True."""
    node, dims = k_transposed, value(k_transposed).dim()
    first = node.args[0] if node.args else None
    swaps = _name(node) in ("transpose", "swapaxes") and len(node.args) == 3
    if swaps and sorted(d % dims for d in node.args[1:] if isinstance(d, int)) == [dims - 2, dims - 1]:  # type: ignore[operator]
        return first, False  # type: ignore[return-value]
    if node.target is getattr and node.args[1] == "mT":
        return first, False  # type: ignore[return-value]
    return node, True


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
