"""The operator ``mst::attention`` and its gradient: schemas, eager reference, fakes, autograd.

``q`` is ``[batch, heads, length, size]``, ``k`` is ``[batch, key heads, length, size]`` and ``v`` ``[batch, key heads,
length, value size]``, which may be another; key heads divide heads, and query head ``h`` reads key head ``h // (heads
// key heads)``. ``key_mask`` (bool ``[batch, length]``
or None) is True for keys that may be seen, as for padding. ``parts`` are the numbers of
:class:`mst_compile.rules.patterns.Parts`. A query that sees no key gets 0, where PyTorch's kernels give NaN or an
average.

The operator returns the result, laid out ``[batch, length, heads, value size]`` in memory as PyTorch's flash attention
does it, and the logarithm of each softmax's denominator, float32 (float64 for float64) ``[batch, heads, length]``. The
gradient recomputes the rest. Sums and exponentials are float32; of bfloat16 operands a kernel may round probabilities,
and their gradients, to bfloat16 before it multiplies them, as ``scaled_dot_product_attention`` does: those for GPUs do,
and those for CPUs that have bf16 dot products. The reference below forms the dense scores and rounds nothing but its
results; it is the oracle of all kernels, and what runs where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mst_compile.rules.patterns import Parts, allowed

from .library import define


def empty_result(like: Tensor, size: Any = None) -> Tensor:
    """A result like ``like``, of heads of ``size`` if given, whose tokens lie side by side in memory."""
    batch, heads, length, own = like.shape
    return like.new_empty(batch, length, heads, own if size is None else size).transpose(1, 2)


def _probabilities(
    q: Tensor, k: Tensor, lse: Tensor | None, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Softmax of the masked scores, its log-denominator, and the dtype that both are computed in."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    if lse is None:
        lse = torch.logsumexp(scores, -1)
    finite = lse.masked_fill(lse == -torch.inf, 0)  # no key at all: exp(-inf - 0) = 0
    return torch.exp(scores - finite[..., None]), lse, wide


def _queries_a_key_head(q: Tensor, k: Tensor) -> int:
    return q.shape[1] // k.shape[1] if k.shape[1] else 1


def _mask(q: Tensor, key_mask: Tensor | None, parts: Sequence[int]) -> Tensor:
    mask = allowed(Parts(*parts), q.shape[2], q.device)
    return mask if key_mask is None else mask & key_mask[:, None, None, :]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, parts: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + mask) v`` on the keys that the parts hold, and the log-denominators."""
    group = _queries_a_key_head(q, k)
    mask = _mask(q, key_mask, parts)
    p, lse, wide = _probabilities(q, k.repeat_interleave(group, 1), None, mask, scale)
    out = empty_result(q, v.shape[-1])
    out.copy_(p @ v.to(wide).repeat_interleave(group, 1))
    return out, lse


def attention_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    parts: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_reference` with respect to ``q``, ``k`` and ``v``."""
    group = _queries_a_key_head(q, k)
    mask = _mask(q, key_mask, parts)
    p, _, wide = _probabilities(q, k.repeat_interleave(group, 1), lse, mask, scale)
    grad = grad.to(wide)
    delta = (grad * out.to(wide)).sum(-1, keepdim=True)
    ds = p * (grad @ v.to(wide).repeat_interleave(group, 1).transpose(-1, -2) - delta) * scale

    def of_keys(per_head: Tensor, like: Tensor) -> Tensor:
        return empty_result(like).copy_(per_head.unflatten(1, (*like.shape[1:2], group)).sum(2))

    dq = empty_result(q).copy_(ds @ k.to(wide).repeat_interleave(group, 1))
    return dq, of_keys(ds.transpose(-1, -2) @ q.to(wide), k), of_keys(p.transpose(-1, -2) @ grad, v)


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, int[] parts, float scale) -> (Tensor, Tensor)",
    attention_reference,
)
define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask,"
    " int[] parts, float scale) -> (Tensor, Tensor, Tensor)",
    attention_backward_reference,
)


@torch.library.register_fake("mst::attention")
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_result(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("mst::attention_backward")
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_result(q), empty_result(k), empty_result(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, ctx.parts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, key_mask)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, key_mask = ctx.saved_tensors
    gradients = torch.ops.mst.attention_backward(grad, q, k, v, out, lse, key_mask, ctx.parts, ctx.scale)
    return (*gradients, None, None, None)


torch.library.register_autograd("mst::attention", _backward, setup_context=_save)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, q, k, v, _, _, key_mask, ctx.parts, ctx.scale = inputs
    ctx.save_for_backward(grad, q, k, v, key_mask)


def _backward_of_backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
    """Double backward, of graphs that run without AOTAutograd, which knows none: through the reference, run again."""
    *given, key_mask = ctx.saved_tensors
    with torch.enable_grad():
        grad, q, k, v = (t.detach().requires_grad_() for t in given)
        out, _ = attention_reference(q, k, v, key_mask, ctx.parts, ctx.scale)
        inner = torch.autograd.grad(out, (q, k, v), grad, create_graph=True)
        found = torch.autograd.grad(inner, (grad, q, k, v), outer)
    return (*found, None, None, None, None, None)


torch.library.register_autograd("mst::attention_backward", _backward_of_backward, setup_context=_save_backward)
