"""The attention kernels as functions on tensors. See ``abi.h`` for what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mst_compile.rules.patterns import Parts

from . import abi, table
from .library import Library, code_of, loaded, pointer

LSE_DTYPE = torch.float32
LARGEST_HEAD = 512  # MST_LARGEST_HEAD of abi.h


def supports_head(dtype: torch.dtype, size: int, value_size: int) -> bool:
    """Whether the kernels take heads of this dtype whose queries and keys, and whose values, have these sizes."""
    return dtype in table.CODES and 1 <= size <= LARGEST_HEAD and 1 <= value_size <= LARGEST_HEAD


def supports_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take operands of these dtypes and shapes."""
    same = q.dtype == k.dtype == v.dtype and supports_head(q.dtype, q.shape[-1], v.shape[-1])
    return same and q.numel() > 0 and v.numel() > 0


def _heads(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> abi.Heads:
    if t.shape != shape or t.dtype != dtype:
        raise ValueError(f"attention: {name} must be {tuple(shape)} {dtype}, not {tuple(t.shape)} {t.dtype}")
    if t.device.type != "cpu" or t.stride(3) != 1:
        raise ValueError(f"attention: {name} must be on the CPU, with unit stride along its last dimension")
    return abi.Heads(pointer(t), t.stride(0), t.stride(1), t.stride(2))


def _key_mask(t: Tensor | None, shape: tuple[int, int]) -> int | None:
    if t is None:
        return None
    if t.shape != shape or t.dtype != torch.bool or not t.is_contiguous() or t.device.type != "cpu":
        raise ValueError(f"attention: key_mask must be contiguous bool {shape}, not {tuple(t.shape)} {t.dtype}")
    return pointer(t)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    parts: Sequence[int],
    scale: float,
) -> abi.Attention:
    if not q.dim() == k.dim() == v.dim() == 4 or not supports_attention(q, k, v):
        given = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"attention: no kernel for {given}")
    batch, heads, length, size = q.shape
    value_size = v.shape[-1]
    if heads % k.shape[1] or k.shape != (batch, k.shape[1], length, size):
        raise ValueError(f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} do not fit")
    if lse.shape != (batch, heads, length) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"attention: lse must be contiguous float32 {(batch, heads, length)}")
    # A number that exceeds the length sees nothing else, and must not overflow.
    numbers = abi.Parts(*(min(number, length) for number in Parts(*parts).numbers))
    problem = abi.Attention(batch, heads, k.shape[1], length, size, value_size, numbers)
    problem.dtype, problem.threads, problem.scale = code_of(q), torch.get_num_threads(), scale
    problem.key_mask = _key_mask(key_mask, (batch, length))
    problem.lse = pointer(lse)
    problem.q = _heads(q, q.shape, q.dtype, "q")
    problem.k = _heads(k, k.shape, q.dtype, "k")
    problem.v = _heads(v, (*k.shape[:3], value_size), q.dtype, "v")
    problem.out = _heads(out, (*q.shape[:3], value_size), q.dtype, "out")
    return problem


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    parts: Sequence[int],
    scale: float,
    *,
    out: Tensor,
    lse: Tensor,
    library: Library | None = None,
) -> None:
    """Writes ``mst::attention``'s two results to ``out`` and ``lse``.

    Tensors have unit stride along their last dimension and any other strides; the mask is contiguous bool; float32 or
    bfloat16 (sums are float32). Values, and so the result, may be of another size than queries and keys. All
    combinations of :class:`Parts` are taken. Raises ValueError if a shape, stride or dtype does not fit, or if the
    parts are none.
    """
    problem = _problem(q, k, v, out, lse, key_mask, parts, scale)
    (library or loaded()).call("mst_attention", problem)


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
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    library: Library | None = None,
) -> None:
    """Writes ``mst::attention_backward``'s results to ``dq``, ``dk`` and ``dv``. Operands as in :func:`attention`."""
    problem = _problem(q, k, v, out, lse, key_mask, parts, scale)
    problem.grad = _heads(grad, out.shape, q.dtype, "grad")
    problem.dq = _heads(dq, q.shape, q.dtype, "dq")
    problem.dk = _heads(dk, k.shape, q.dtype, "dk")
    problem.dv = _heads(dv, v.shape, q.dtype, "dv")
    (library or loaded()).call("mst_attention_backward", problem)
