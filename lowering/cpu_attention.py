"""``mst::attention`` and its gradient on the CPU; None where there is no kernel."""

from __future__ import annotations

from mst_compile.kernels import cpu as kernels
from torch import Tensor


def _supported(q: Tensor, k: Tensor, v: Tensor, pattern: str, window: int, stride: int) -> bool:
    fits = pattern in kernels.PATTERNS and window >= 1 and stride >= 1
    return fits and kernels.supports_attention(q, k, v) and kernels.available()


def _rows(t: Tensor) -> Tensor:
    """``t`` with unit stride along its last dimension."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _bools(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.bool().contiguous()


def _empty(like: Tensor) -> Tensor:
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    blocks: Tensor | None,
    pattern: str,
    window: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """``mst::attention``."""
    if not _supported(q, k, v, pattern, window, stride):
        return None
    blocks = blocks if pattern == "blocks" else None
    out, lse = _empty(q), q.new_empty(q.shape[:3], dtype=kernels.LSE_DTYPE)
    kernels.attention(
        _rows(q), _rows(k), _rows(v), _bools(key_mask), _bools(blocks), pattern, window, stride, scale,
        out=out, lse=lse,
    )  # fmt: skip
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    blocks: Tensor | None,
    pattern: str,
    window: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``mst::attention_backward``."""
    if not _supported(q, k, v, pattern, window, stride) or grad.dtype != q.dtype:
        return None
    blocks = blocks if pattern == "blocks" else None
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    kernels.attention_backward(
        _rows(grad), _rows(q), _rows(k), _rows(v), _rows(out), lse.contiguous(), _bools(key_mask), _bools(blocks),
        pattern, window, stride, scale, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return dq, dk, dv
