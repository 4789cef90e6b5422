"""``mst::attention`` and its gradient on the CPU; None where there is no kernel."""

from __future__ import annotations

from collections.abc import Sequence

from mst_compile.kernels import cpu as kernels
from torch import Tensor

from mst_compile.ops.attention import empty_result


def _supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return kernels.supports_attention(q, k, v) and kernels.available()


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors with unit stride along their last dimension."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _bools(t: Tensor | None, q: Tensor) -> Tensor | None:
    return None if t is None else t.bool().expand(q.shape[0], q.shape[2]).contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, parts: Sequence[int], scale: float
) -> tuple[Tensor, Tensor] | None:
    """``mst::attention``."""
    if not _supported(q, k, v):
        return None
    out, lse = empty_result(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=kernels.LSE_DTYPE)
    kernels.attention(*_rows(q, k, v), _bools(key_mask, q), parts, scale, out=out, lse=lse)
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    parts: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``mst::attention_backward``."""
    if not _supported(q, k, v) or grad.dtype != q.dtype:
        return None
    dq, dk, dv = empty_result(q), empty_result(k), empty_result(v)
    kernels.attention_backward(
        *_rows(grad, q, k, v, out), lse.contiguous(), _bools(key_mask, q), parts, scale, dq=dq, dk=dk, dv=dv
    )
    return dq, dk, dv
