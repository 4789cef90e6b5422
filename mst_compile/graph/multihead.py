"""Write ``F.multi_head_attention_forward`` out: one opaque node becomes linear layers and an attention.

``nn.MultiheadAttention`` and the layers of ``nn.Transformer`` are a single node in Dynamo's graph. Written out, their
projections can become sparse products and their attention can be recognised. What comes out is the function's own
definition; forms that few use (extra key and value biases, attention weights that are used, ...) stay as they were.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from mst_compile.graph.linear import value

_MULTIHEAD = torch.nn.functional.multi_head_attention_forward
_SIGNATURE = inspect.signature(_MULTIHEAD)
_LINEAR = torch._C._nn.linear
_ATTENTION = torch._C._nn.scaled_dot_product_attention
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


class Emitter:
    """Adds nodes in place of one node, each with the fake result that later passes and AOTAutograd's cache ask for."""

    def __init__(self, node: fx.Node, fake_mode: Any = None) -> None:
        self._graph, self._node = node.graph, node
        fakes = (value(n) for n in node.graph.nodes)
        self._mode = fake_mode or next((v.fake_mode for v in fakes if isinstance(v, FakeTensor)), None)

    def __call__(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._node):
            if isinstance(target, str):
                new = self._graph.call_method(target, args, kwargs)
            else:
                new = self._graph.call_function(target, args, kwargs)
        values, named = fx.node.map_arg(args, value), fx.node.map_arg(kwargs, value)
        with self._mode or contextlib.nullcontext(), torch.no_grad(), _autocast_at(self._node):
            function = getattr(values[0], target) if isinstance(target, str) else target
            new.meta["example_value"] = function(*(values[1:] if isinstance(target, str) else values), **named)
        for name in ("nn_module_stack", "source_fn_stack", "stack_trace"):
            if name in self._node.meta:
                new.meta[name] = self._node.meta[name]
        return new


@contextlib.contextmanager
def _autocast_at(node: fx.Node) -> Iterator[None]:
    """The autocast regions of the graph that a node stands in: they decide on the dtype of results."""
    open_regions: dict[fx.Node, tuple[Any, ...]] = {}
    for n in node.graph.nodes:
        if n is node:
            break
        if n.target is _ENTER:
            open_regions[n] = n.args
        elif n.target is _EXIT:
            open_regions.pop(n.args[0], None)  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cache in open_regions.values():
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


def expand_multihead(graph_module: fx.GraphModule) -> int:
    """Write multi-head attentions out, in place; returns how many."""
    # bodies of higher-order operators, such as activation checkpointing
    changed = sum(expand_multihead(m) for _, m in graph_module.named_children() if isinstance(m, fx.GraphModule))
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not _MULTIHEAD:
            continue
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        if why_opaque(node, bound.arguments) is None:
            _expand(node, bound.arguments)
            changed += 1
    if changed:
        graph_module.recompile()
    return changed


def is_multihead(node: fx.Node) -> bool:
    """Whether a node is a multi-head attention that was not written out."""
    return node.op == "call_function" and node.target is _MULTIHEAD


def why_opaque(node: fx.Node, given: dict[str, Any] | None = None) -> str | None:
    """Why a multi-head attention cannot be written out, or None."""
    if given is None:
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        given = bound.arguments
    if any(user.target is not operator.getitem for user in node.users):
        return "its result is used as a whole"
    if given["need_weights"] and any(user.args[1] != 0 for user in node.users):
        return "its attention weights are used"
    if any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or given["add_zero_attn"]:
        return "it adds keys of its own"
    if not isinstance(value(given["query"]), Tensor) or value(given["query"]).dim() != 3:
        return "its input has no batch dimension"
    return None


def _expand(node: fx.Node, given: dict[str, Any]) -> None:
    emit = Emitter(node)
    heads = given["num_heads"]
    q, k, v = (emit("permute", emit("unflatten", x, -1, (heads, -1)), 1, 2, 0, 3) for x in _projections(emit, given))
    causal = bool(given["is_causal"]) and given["key_padding_mask"] is None and not given["need_weights"]
    mask = None if causal else _mask(emit, given)
    dropout = given["dropout_p"] if given["training"] else 0.0
    attended = emit(_ATTENTION, q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    joined = emit("flatten", emit("permute", attended, 2, 0, 1, 3), -2)
    out = emit(_LINEAR, joined, given["out_proj_weight"], given["out_proj_bias"])
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(out)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _projections(emit: Emitter, given: dict[str, Any]) -> list[fx.Node]:
    """Queries, keys and values, ``[length, batch, features]``; one linear layer where all have the same input."""
    inputs = [given["query"], given["key"], given["value"]]
    bias = given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"]]
    elif inputs[0] is inputs[1] is inputs[2]:
        return _thirds(emit, emit(_LINEAR, inputs[0], given["in_proj_weight"], bias), -1)
    else:
        weights = _thirds(emit, given["in_proj_weight"], 0)
    biases = [None] * 3 if bias is None else _thirds(emit, bias, 0)
    return [emit(_LINEAR, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _thirds(emit: Emitter, node: fx.Node, dim: int) -> list[fx.Node]:
    parts = emit("chunk", node, 3, dim)
    return [emit(operator.getitem, parts, i) for i in range(3)]


def _mask(emit: Emitter, given: dict[str, Any]) -> fx.Node | None:
    """One mask for ``scaled_dot_product_attention``. The function's bool masks say what to hide, not what to keep."""
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if mask is not None and value(mask).dim() == 3:  # [batch * heads, queries, keys]
        mask = emit("unflatten", mask, 0, (-1, given["num_heads"]))
    if padding is not None:
        padding = emit("unsqueeze", emit("unsqueeze", padding, 1), 1)
    masks = [m for m in (mask, padding) if m is not None]
    if all(value(m).dtype == torch.bool for m in masks):
        masks = [emit(torch.logical_not, m) for m in masks]
        return emit(torch.logical_and, *masks) if len(masks) == 2 else next(iter(masks), None)
    dtype = value(given["query"]).dtype
    masks = [
        emit("to", emit(torch.where, m, -torch.inf, 0.0), dtype) if value(m).dtype == torch.bool else m for m in masks
    ]
    return emit(torch.add, *masks) if len(masks) == 2 else masks[0]
