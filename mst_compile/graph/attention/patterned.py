"""Give attention its pattern: causal self-attention in whatever form becomes ``mst::attention``.

Names play no part; what is not understood stays as it was, and a :class:`~mst_compile.graph.context.Site` says why.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from mst_compile.graph.attention import forms
from mst_compile.graph.attention.causality import Finding, find
from mst_compile.graph.attention.constant import Constant
from mst_compile.graph.attention.evaluate import Evaluator, Evaluators
from mst_compile.graph.attention.found import Attention
from mst_compile.graph.attention.rewrite import replace, why_not
from mst_compile.graph.context import Context, Site
from mst_compile.graph.fx import Region, constant, value, walk, where


def run(graph_module: fx.GraphModule, context: Context) -> int:
    """Rewrite attention in place; returns how many have the pattern now. Without a pattern, only say what is there."""
    rewrite = _Rewrite(context)
    for region, node in walk(graph_module):
        found = next((f for f in (form(region, node) for form in forms.FORMS) if f is not None), None)
        if found is not None:
            rewrite.visit(region, found)
    context.constants += rewrite.constants()
    return sum(site.replaced for site in context.sites)


class _Rewrite:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._evaluators = Evaluators(actual=context.inputs)
        self._known: dict[Any, Finding] = {}

    def visit(self, region: Region, found: Attention) -> None:
        evaluator = self._evaluators[region]
        reason = found.reason or _why_dropout(found.dropout) or self._why_not(found)
        if reason is None and found.mask is not None:
            finding = self._finding(region, found, evaluator)
            reason, found.padding, found.hides = finding.reason, finding.padding, finding.hides
            found.scale = found.scale if found.product is None else finding.scale
        elif reason is None and not found.causal:
            reason = "it is not causal"
        reason = reason or self._why_not(found)
        causal = reason is None
        if self._context.pattern is None:
            reason = reason or "the pattern is full"
        shape = () if reason else (*value(found.q).shape, value(found.v).shape[-1])
        self._context.sites.append(Site(where(found.out), found.form, causal, reason is None, reason or "", shape))
        if reason is None and self._context.pattern is not None:
            found.padding = None if found.padding is None else region.receive(found.padding)
            replace(found, self._context.pattern, evaluator)

    def constants(self) -> list[Constant]:
        """The buffers that were relied on, by their position in Dynamo's own graph."""
        return [
            Constant(evaluator.placeholders.index(node), buffer)
            for region, evaluator in self._evaluators.items()
            if region.outer is None
            for node, buffer in evaluator.relied.items()
        ]

    def _why_not(self, found: Attention) -> str | None:
        reason = why_not(found)
        if reason is not None:
            return reason
        out = value(found.out)
        sizes = value(found.q).shape[-1], value(found.v).shape[-1]
        return self._context.why_no_attention(out.device.type, out.dtype, *sizes)

    def _finding(self, region: Region, found: Attention, evaluator: Evaluator) -> Finding:
        at = found.out if found.reader is None else found.reader
        key = (region, found.alike(), evaluator.version(found.outside(), at))
        if key not in self._known:
            assert found.mask is not None
            self._known[key] = find(evaluator, found.mask, at, found.product)
        return self._known[key]


def _why_dropout(rates: list[Any]) -> str | None:
    for rate in rates:
        number = constant(rate)
        if number is None:
            return "its weights drop out at a rate that may differ from call to call"
        if number != 0:
            return f"its weights drop out at a rate of {number}"
    return None
