"""Give attention its causality back.

Models that build an explicit causal mask hand ``scaled_dot_product_attention`` a dense mask, and its kernels then do
twice the work. Where the mask depends on no input of the graph, its own slice of the graph is executed; a mask that
comes out causal is replaced by ``is_causal=True``. Masked entries had a weight of exactly 0 before, so nothing changes
but the time. Names play no part; what is not understood stays as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

_ATTENTION = torch._C._nn.scaled_dot_product_attention
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MAX_NODES = 200
_MAX_ELEMENTS = 1 << 26


def recover_causal(graph_module: fx.GraphModule) -> int:
    """Replace constant causal masks in place; returns how many attentions changed."""
    known: dict[fx.Node, bool] = {}
    changed = 0
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target is not _ATTENTION:
            continue
        arguments: dict[str, Any] = dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
        mask = arguments.get("attn_mask")
        if not isinstance(mask, fx.Node) or arguments.get("is_causal"):
            continue
        if mask not in known:
            value = _evaluate(mask)
            known[mask] = value is not None and is_causal(value)
        if known[mask]:
            arguments["attn_mask"], arguments["is_causal"] = None, True
            node.args, node.kwargs = (), arguments
            changed += 1
    if changed:
        graph_module.recompile()
    return changed


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


@torch.no_grad()
def _evaluate(node: fx.Node) -> Tensor | None:
    """The value of a node that depends on no input, or None."""
    order = _slice(node)
    if order is None:
        return None
    values: dict[fx.Node, Any] = {}
    try:
        # Outside of Dynamo's fake mode: these are real, small tensors. Should one be random, the user's generator must
        # not notice.
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
            for n in order:
                args = fx.node.map_arg(n.args, values.__getitem__)
                kwargs = fx.node.map_arg(n.kwargs, values.__getitem__)
                if n.op == "call_method":
                    values[n] = getattr(args[0], n.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
                else:
                    values[n] = n.target(*args, **kwargs)  # type: ignore[operator]
                if isinstance(values[n], Tensor) and values[n].numel() > _MAX_ELEMENTS:
                    return None
    except Exception:
        return None  # whatever cannot run on its own stays as it was
    result = values[node]
    return result if isinstance(result, Tensor) else None


def _slice(node: fx.Node) -> list[fx.Node] | None:
    """What ``node`` depends on in executable order, or None if that includes an input of the graph."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n in found:
            continue
        if n.op not in ("call_function", "call_method") or len(found) > _MAX_NODES:
            return None
        found.add(n)
        stack.extend(n.all_input_nodes)
    return [n for n in node.graph.nodes if n in found]
