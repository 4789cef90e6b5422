"""The attention kernels as functions on tensors. See ``abi.h`` for what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from . import abi, table
from .library import Library, code_of, loaded

PATTERNS = ("full", "local", "strided", "sparse", "fixed", "blocks")  # the order of abi.h
LSE_DTYPE = torch.float32


def supports_head(dtype: torch.dtype, size: int) -> bool:
    """Whether the kernels take heads of this size and dtype."""
    return dtype in table.CODES and size % 8 == 0 and 32 <= size <= 256


def supports_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take operands of these dtypes and shapes."""
    same = q.dtype == k.dtype == v.dtype and supports_head(q.dtype, q.shape[-1])
    return same and q.numel() > 0 and k.numel() > 0


def _heads(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> abi.Heads:
    if t.shape != shape or t.dtype != dtype:
        raise ValueError(f"attention: {name} must be {tuple(shape)} {dtype}, not {tuple(t.shape)} {t.dtype}")
    if t.device.type != "cpu" or t.stride(3) != 1:
        raise ValueError(f"attention: {name} must be on the CPU, with unit stride along its last dimension")
    return abi.Heads(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _bools(t: Tensor | None, shape: tuple[int, ...], name: str) -> int | None:
    if t is None:
        return None
    if t.shape != shape or t.dtype != torch.bool or not t.is_contiguous() or t.device.type != "cpu":
        raise ValueError(f"attention: {name} must be contiguous bool {shape}, not {tuple(t.shape)} {t.dtype}")
    return t.data_ptr()


def _problem(
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
) -> abi.Attention:
    if q.dim() != 4 or k.dim() != 4 or not supports_attention(q, k, v):
        raise ValueError(f"attention: no kernel for q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}")
    batch, heads, length, size = q.shape
    if heads % k.shape[1] or k.shape != (batch, k.shape[1], length, size):
        raise ValueError(f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} do not fit")
    if pattern not in PATTERNS or window < 1 or stride < 1:
        raise ValueError(f"attention: pattern {pattern!r}, window {window}, stride {stride}")
    if (pattern == "blocks") != (blocks is not None):
        raise ValueError('attention: blocks belong to the pattern "blocks", and to no other')
    if lse.shape != (batch, heads, length) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"attention: lse must be contiguous float32 {(batch, heads, length)}")
    chunks = -(-length // stride)
    longest = max(length, 1)  # a longer window or stride sees nothing else, and must not overflow
    problem = abi.Attention(batch, heads, k.shape[1], length, size, min(window, longest), min(stride, longest))
    problem.dtype, problem.pattern, problem.threads = code_of(q), PATTERNS.index(pattern), torch.get_num_threads()
    problem.scale = scale
    problem.key_mask = _bools(key_mask, (batch, length), "key_mask")
    problem.blocks = _bools(blocks, (chunks, chunks), "blocks")
    problem.lse = lse.data_ptr()
    problem.q = _heads(q, q.shape, q.dtype, "q")
    problem.k = _heads(k, k.shape, q.dtype, "k")
    problem.v = _heads(v, k.shape, q.dtype, "v")
    problem.out = _heads(out, q.shape, q.dtype, "out")
    return problem


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
    *,
    out: Tensor,
    lse: Tensor,
    library: Library | None = None,
) -> None:
    """Writes ``mst::attention``'s two results to ``out`` and ``lse``.

    Tensors have unit stride along their last dimension and any other strides; masks are contiguous bool; float32 or
    bfloat16 (sums are float32). Raises ValueError if a shape, stride or dtype does not fit.
    """
    problem = _problem(q, k, v, out, lse, key_mask, blocks, pattern, window, stride, scale)
    (library or loaded()).call("mst_attention", problem)


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
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    library: Library | None = None,
) -> None:
    """Writes ``mst::attention_backward``'s results to ``dq``, ``dk`` and ``dv``. Operands as in :func:`attention`."""
    problem = _problem(q, k, v, out, lse, key_mask, blocks, pattern, window, stride, scale)
    problem.grad = _heads(grad, q.shape, q.dtype, "grad")
    problem.dq = _heads(dq, q.shape, q.dtype, "dq")
    problem.dk = _heads(dk, k.shape, q.dtype, "dk")
    problem.dv = _heads(dv, k.shape, q.dtype, "dv")
    (library or loaded()).call("mst_attention_backward", problem)
