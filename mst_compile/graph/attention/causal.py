"""Give attention its causality back.

Models that build an explicit causal mask hand ``scaled_dot_product_attention`` a dense mask, and its kernels then do
twice the work. Masks that depend on no input of the graph are executed; one that comes out causal is replaced by
``is_causal=True``. Masked entries had a weight of exactly 0 before, so nothing changes but the time.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from mst_compile.graph.attention.causality import find
from mst_compile.graph.attention.evaluate import Evaluators
from mst_compile.graph.attention.forms import sdpa_arguments
from mst_compile.graph.context import Context
from mst_compile.graph.fx import ATTENTION, calls, walk


def run(graph_module: fx.GraphModule, _: Context) -> int:
    """Replace constant causal masks in place; returns how many attentions changed."""
    evaluators = Evaluators(inputs=False)
    known: dict[Any, bool] = {}
    changed = 0
    for region, node in walk(graph_module):
        given = sdpa_arguments(node) if calls(node, {ATTENTION}) else {}
        mask = given.get("attn_mask")
        if not isinstance(mask, fx.Node) or given.get("is_causal"):
            continue
        evaluator = evaluators[region]
        key = (region, mask, evaluator.version([mask], node))
        if key not in known:
            known[key] = find(evaluator, mask, node).reason is None
        if known[key]:
            node.args, node.kwargs = (), given | {"attn_mask": None, "is_causal": True}
            changed += 1
    return changed
