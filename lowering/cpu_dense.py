"""The library's dense products, with the operands of our kernels.

A weight is exactly 0 outside its active blocks, so they compute the same. What they get from the activations' dtype is
what the dense model gets: in bfloat16 a gradient for a float32 weight is rounded to bfloat16 on the way, as autocast
does it, where our kernels keep float32 sums.
"""

from __future__ import annotations

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor


def linear(x2d: Tensor, weight: Tensor, bias: Tensor | None, outputs_are_rows: bool, out: Tensor) -> None:
    """Write ``x2d @ weight.T + bias`` (``outputs_are_rows``) or ``x2d @ weight + bias`` to ``out``."""
    x, w = _rows(x2d), weight.to(x2d.dtype)
    w = w.t() if outputs_are_rows else w
    if bias is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(bias.to(x2d.dtype), x, w, out=out)


def grad_weight(
    a2d: Tensor, b2d: Tensor, index: Tensor, block: int, out: Tensor, colsum: Tensor | None, colsum_of_a: bool
) -> None:
    """As :func:`mst_compile.kernels.cpu.grad_weight`: zeros outside the active blocks, column sums for a bias."""
    a, b = _rows(a2d), _rows(b2d)
    if out.dtype == a.dtype:
        torch.mm(a.t(), b, out=out)
    else:
        out.copy_(a.t() @ b)
    kernels.zero_inactive_(out, index, block)
    if colsum is not None:
        torch.sum(a if colsum_of_a else b, 0, dtype=torch.float32, out=colsum)


def _rows(x: Tensor) -> Tensor:
    """PyTorch's bfloat16 product reads past the rows of strided operands on CPUs with AMX."""
    return x if x.dtype == torch.float32 else x.contiguous()
