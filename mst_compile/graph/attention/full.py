"""Run full causal attention on the device's kernel where it is faster.

The operator computes the same function; what it rounds differently is what PyTorch's own kernels round differently
from one another. Only attention that the graph says to be causal is taken: no mask is looked at.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from mst_compile.graph.attention import forms
from mst_compile.graph.attention.evaluate import Evaluators
from mst_compile.graph.attention.rewrite import replace, why_not
from mst_compile.graph.context import Context
from mst_compile.graph.fx import value, walk
from mst_compile.rules.patterns import FULL


def run(graph_module: fx.GraphModule, context: Context) -> int:
    """Rewrite ``scaled_dot_product_attention(..., is_causal=True)`` in place; returns how many."""
    evaluators, changed = Evaluators(actual=context.inputs), 0
    for region, node in walk(graph_module):
        found = forms.sdpa(region, node)
        if found is None or not found.causal or found.mask is not None or found.dropout != [0.0] or why_not(found):
            continue
        q, k = value(found.q), value(found.k)
        if _heads(q) != _heads(k):
            continue
        sizes = q.shape[-1], value(found.v).shape[-1]
        shape = _hint(q.shape[0]) * _hint(_heads(q)), _hint(q.shape[-2]), *sizes
        if context.attention_pays(q.device.type, *shape, q.dtype):
            replace(found, FULL, evaluators[region])
            changed += 1
    return changed


def _heads(x: torch.Tensor) -> Any:
    return x.shape[1]


def _hint(size: int | torch.SymInt) -> int:
    """A size; of a symbolic one the value that it has had, and 0 of one that depends on values."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(cast(int, size.node.hint)) if size.node.has_hint() else 0
