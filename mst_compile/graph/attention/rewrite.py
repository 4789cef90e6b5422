"""Put ``mst::attention`` in place of an attention that was found."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from mst_compile.graph.attention.evaluate import VARIES, Evaluator, UnknownError
from mst_compile.graph.attention.found import Attention
from mst_compile.graph.fx import (
    Emitter,
    before_cast,
    computes,
    constant,
    holds,
    is_recorded,
    keeps_gradient,
    name,
    same_size,
    value,
)
from mst_compile.rules.patterns import Parts

_VIEWS = {"reshape", "view", "expand", "getitem", "unsqueeze", "repeat_interleave", "contiguous", "flatten", "repeat"}
_LAYOUT = {"view", "transpose", "permute", "unsqueeze", "squeeze", "swapaxes"}
_MAX_VIEWS = 6


def why_not(found: Attention) -> str | None:
    """Why the operator cannot stand in for an attention by the shapes of its operands, or None."""
    if not all(isinstance(value(n), Tensor) for n in (found.q, found.k, found.v, found.out)):
        return "its tensors are unknown"
    q, k, v = (tuple(value(n).shape) for n in (found.q, found.k, found.v))
    k = (*k[:-2], k[-1], k[-2]) if found.flipped and len(k) >= 2 else k
    dims = (len(q), len(k), len(v))
    if dims != (4, 4, 4) and (found.product is None or dims not in ((3, 3, 3), (3, 3, 4))):
        return f"its operands have {dims[0]}, {dims[1]} and {dims[2]} dimensions"
    if not (same_size(q[-2], k[-2]) and same_size(k[-2], v[-2])):
        return "queries and keys differ in length"
    if not same_size(q[-1], k[-1]):
        return "queries and keys differ in size"
    if not (isinstance(q[-1], int) and isinstance(v[-1], int)):
        return "the size of its heads may differ from call to call"
    batch = v[0]
    if dims == (3, 3, 4):
        batch = v[0] * v[1]
    if not (same_size(q[0], batch) and same_size(k[0], batch)):
        return "queries, keys and values differ in batch"
    if dims == (4, 4, 4) and not (same_size(k[1], v[1]) and _heads_fit(q[1], k[1], found.grouped)):
        return "its heads do not fit"
    if found.padding is not None and not all(map(same_size, value(found.padding).shape, (v[0], v[-2]))):
        return "its padding has another shape"
    if found.scale is not None and constant(found.scale) is None:
        return f"its mask {VARIES}"
    if _stops_gradient(found):
        return "no gradient passes its scores"
    return _precision(found)


def _heads_fit(heads: Any, key_heads: Any, grouped: bool) -> bool:
    if not (isinstance(heads, int) and isinstance(key_heads, int)) or heads % key_heads:
        return False
    return grouped or key_heads in (1, heads)


def _stops_gradient(found: Attention) -> bool:
    """Whether its scores or weights were made without recording gradients that its queries and keys would get."""
    if not found.inner or not is_recorded(found.out):
        return False
    wanted = any(value(n).requires_grad for n in (found.q, found.k))
    return any(getattr(value(n), "requires_grad", wanted) is not wanted for n in found.inner)


def _precision(found: Attention) -> str | None:
    """Scores of higher precision than the result are the operator's own habit, if they come from narrow operands."""
    if found.product is None:
        return None
    out, scores = value(found.out).dtype, value(found.product.node).dtype
    if out == scores or torch.promote_types(out, scores) == out:
        return None
    if all(value(_uncast(n, found.out)).dtype == out for n in (found.q, found.k)):
        return None
    return f"its scores are {scores} and its values {out}"


def _uncast(node: fx.Node, reader: fx.Node) -> fx.Node:
    """The node before all casts that changed no value, for ``reader``."""
    while (source := before_cast(node)) is not None and holds(value(node).dtype, value(source).dtype):
        if not keeps_gradient(node, source, reader):
            break
        node = source
    return node


def replace(found: Attention, pattern: Parts, evaluator: Evaluator) -> None:
    """Rewrite the graph around an attention that :func:`why_not` has nothing against."""
    emit = Emitter(found.out)
    k, v = found.k, found.v
    if not found.flipped:
        k, v = _unrepeated(found, evaluator)
    operands = [_cast(emit, n, found.out) for n in (found.q, k, v)]
    if found.flipped:
        operands[1] = emit("transpose", operands[1], -2, -1)
    flat = value(found.v).dim() == 3
    if flat:  # one head
        operands = [emit("unsqueeze", n, 1) for n in operands]
    elif value(found.q).dim() == 3:  # batch and heads side by side
        heads = value(found.v).shape[1]
        operands[:2] = [emit("unflatten", n, 0, (-1, heads)) for n in operands[:2]]
    keys = None if found.padding is None else emit("to", found.padding, torch.bool)
    if keys is not None and found.hides:
        keys = emit(torch.logical_not, keys)
    scale = constant(found.scale)
    scale = value(found.q).shape[-1] ** -0.5 if scale is None else float(scale)
    pair = emit(torch.ops.mst.attention.default, *operands, keys, pattern.numbers, scale)
    new = emit(operator.getitem, pair, 0)
    if flat:
        new = emit("squeeze", new, 1)
    if not _views_fit(found.out, value(new)):
        new = emit("contiguous", new)
    found.out.replace_all_uses_with(new)
    for node in (found.out, *reversed(found.inner)):
        node.graph.erase_node(node)


def _cast(emit: Emitter, node: fx.Node, out: fx.Node) -> fx.Node:
    """An operand in the dtype of the result."""
    dtype = value(out).dtype
    if value(node).dtype == dtype:
        return node
    source = _uncast(node, out)
    return source if value(source).dtype == dtype else emit("to", node, dtype)


def _views_fit(node: fx.Node, tensor: Tensor) -> bool:
    """Whether views of a node, which the model wrote for another layout in memory, can be made of ``tensor``."""
    with tensor.fake_mode, enable_python_dispatcher(), torch.no_grad():  # type: ignore[attr-defined]
        for user in node.users:
            if user.op != "call_method" or user.target not in _LAYOUT or user.args[0] is not node:
                continue
            args = fx.node.map_arg(user.args[1:], value)
            try:
                viewed = getattr(tensor, user.target)(*args)
            except (RuntimeError, ValueError):
                return False
            if not _views_fit(user, viewed):
                return False
    return True


def _unrepeated(found: Attention, evaluator: Evaluator) -> tuple[fx.Node, fx.Node]:
    """Keys and values before they were repeated for each head of a group, if that is what was done to both."""
    k, v = _before_repeat(found.k, evaluator), _before_repeat(found.v, evaluator)
    if k is None or v is None or not same_size(value(k).shape[1], value(v).shape[1]):
        return found.k, found.v
    if not (keeps_gradient(found.k, k, found.out) and keeps_gradient(found.v, v, found.out)):
        return found.k, found.v
    return k, v


def _before_repeat(node: fx.Node, evaluator: Evaluator) -> fx.Node | None:
    """The node of which ``node`` holds each head several times in a row; tried out on numbered entries."""
    shape = value(node).shape
    source = node
    for _ in range(_MAX_VIEWS):
        if not computes(source) or name(source) not in _VIEWS:
            return None
        source = source.args[0]  # type: ignore[assignment]
        before = value(source)
        if not isinstance(before, Tensor) or before.dim() != 4 or not isinstance(before.shape[1], int):
            continue
        if before.shape[1] < shape[1] and shape[1] % before.shape[1] == 0:
            return source if _repeats(source, node, shape[1] // before.shape[1], evaluator) else None
    return None


def _repeats(source: fx.Node, node: fx.Node, times: int, evaluator: Evaluator) -> bool:
    try:
        for sizes in evaluator.sizes():
            evaluator.use(sizes)
            shape = evaluator.concrete(tuple(value(source).shape))
            numbered = torch.arange(shape.numel(), device="cpu").view(shape)
            if not torch.equal(evaluator.evaluate(node, {source: numbered}), numbered.repeat_interleave(times, 1)):
                return False
    except UnknownError:
        return False
    finally:
        evaluator.use(evaluator.hints)
    return True
