"""Write ``F.multi_head_attention_forward`` out: one opaque node becomes linear layers and an attention.

``nn.MultiheadAttention`` and the layers of ``nn.Transformer`` are a single node in Dynamo's graph. Written out, their
projections can become sparse products and their attention can be recognised. What comes out is the function's own
definition; forms that few use (extra key and value biases, attention weights that are used, ...) stay as they were.

In evaluation, without gradients, layers of ``nn.TransformerEncoder`` with ``batch_first`` are one function of PyTorch's
own, ``torch._transformer_encoder_layer_fwd``; it is written out too.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mst_compile.graph.context import Context
from mst_compile.graph.fx import ATTENTION, LINEAR, MULTIHEAD, Emitter, arguments, calls, value, walk

_SIGNATURE = inspect.signature(MULTIHEAD)
_LAYER = torch._transformer_encoder_layer_fwd
# It has no signature in Python: its arguments by its schema, in PyTorch's native_functions.yaml.
_OF_LAYER = (
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first",
    "eps", "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2", "ffn_weight_1", "ffn_bias_1",
    "ffn_weight_2", "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip


def run(graph_module: fx.GraphModule, _: Context) -> int:
    """Write multi-head attentions out, in place; returns how many."""
    changed = 0
    for _region, node in walk(graph_module):
        if is_multihead(node) and why_opaque(node) is None:
            _expand(node, _arguments(node))
        elif calls(node, {_LAYER}) and not value(node.args[0]).is_nested:
            node.replace_all_uses_with(_layer(Emitter(node), arguments(node, *_OF_LAYER)))
            node.graph.erase_node(node)
        else:
            continue
        changed += 1
    return changed


def _arguments(node: fx.Node) -> dict[str, Any]:
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def is_multihead(node: fx.Node) -> bool:
    """Whether a node is a multi-head attention that was not written out."""
    return calls(node, {MULTIHEAD})


def why_opaque(node: fx.Node) -> str | None:
    """Why a multi-head attention cannot be written out, or None."""
    given = _arguments(node)
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
    attended = emit(ATTENTION, q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    joined = emit("flatten", emit("permute", attended, 2, 0, 1, 3), -2)
    out = emit(LINEAR, joined, given["out_proj_weight"], given["out_proj_bias"])
    for user in list(node.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(out)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _projections(emit: Emitter, given: dict[str, Any]) -> list[fx.Node]:
    """Queries, keys and values, ``[length, batch, features]``; one linear layer for those that have the same input."""
    inputs = [given["query"], given["key"], given["value"]]
    bias = given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"]]
    elif inputs[0] is inputs[1] is inputs[2]:
        return _thirds(emit, emit(LINEAR, inputs[0], given["in_proj_weight"], bias), -1)
    elif inputs[1] is inputs[2]:  # in cross attention
        size = value(given["in_proj_weight"]).shape[0] // 3
        biases = [None] * 2 if bias is None else _pieces(emit, bias, [size, 2 * size])
        weights = _pieces(emit, given["in_proj_weight"], [size, 2 * size])
        q, both = (emit(LINEAR, x, w, b) for x, w, b in zip(inputs[:2], weights, biases, strict=True))
        halves = emit("chunk", both, 2, -1)
        return [q, *(emit(operator.getitem, halves, i) for i in range(2))]
    else:
        weights = _thirds(emit, given["in_proj_weight"], 0)
    biases = [None] * 3 if bias is None else _thirds(emit, bias, 0)
    return [emit(LINEAR, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _thirds(emit: Emitter, node: fx.Node, dim: int) -> list[fx.Node]:
    parts = emit("chunk", node, 3, dim)
    return [emit(operator.getitem, parts, i) for i in range(3)]


def _pieces(emit: Emitter, node: fx.Node, sizes: list[int]) -> list[fx.Node]:
    parts = emit("split", node, sizes)
    return [emit(operator.getitem, parts, i) for i in range(len(sizes))]


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


# ---- a layer in evaluation -------------------------------------------------------------------------------------------


def _heads(emit: Emitter, x: fx.Node, given: dict[str, Any]) -> fx.Node:
    """Self-attention of ``x``, ``[batch, length, features]``."""
    heads = given["num_heads"]
    thirds = _thirds(emit, emit(LINEAR, x, given["qkv_weight"], given["qkv_bias"]), -1)
    q, k, v = (emit("transpose", emit("unflatten", third, -1, (heads, -1)), 1, 2) for third in thirds)
    hidden = given.get("mask")
    if hidden is None:
        attended = emit(ATTENTION, q, k, v)
    else:
        # It takes whatever is not 0 in a mask as hidden. A query that sees no key gets NaN from a softmax, as there;
        # scaled_dot_product_attention would say 0.
        hidden = emit("to", hidden, torch.bool)
        if given.get("mask_type") == 1:  # of keys, [batch, length]
            hidden = emit("unsqueeze", emit("unsqueeze", hidden, 1), 1)
        scores = emit(torch.matmul, emit(operator.mul, q, value(q).shape[-1] ** -0.5), emit("transpose", k, -2, -1))
        weights = emit(torch.softmax, emit("masked_fill", scores, hidden, -torch.inf), -1)
        attended = emit(torch.matmul, weights, v)
    joined = emit("flatten", emit("transpose", attended, 1, 2), -2)
    return emit(LINEAR, joined, given["proj_weight"], given["proj_bias"])


def _layer(emit: Emitter, given: dict[str, Any]) -> fx.Node:
    """A layer of ``nn.TransformerEncoder``, as ``nn.TransformerEncoderLayer.forward`` writes it."""
    x, first = given["src"], given["norm_first"]

    def norm(x: fx.Node, which: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{which}"], given[f"norm_bias_{which}"]
        return emit(F.layer_norm, x, (given["embed_dim"],), weight, bias, given["eps"])

    def feedforward(x: fx.Node) -> fx.Node:
        hidden = emit(LINEAR, x, given["ffn_weight_1"], given["ffn_bias_1"])
        hidden = emit(F.gelu if given["use_gelu"] else F.relu, hidden)
        return emit(LINEAR, hidden, given["ffn_weight_2"], given["ffn_bias_2"])

    x = emit(operator.add, x, _heads(emit, norm(x, 1) if first else x, given))
    x = x if first else norm(x, 1)
    x = emit(operator.add, x, feedforward(norm(x, 2) if first else x))
    return x if first else norm(x, 2)
