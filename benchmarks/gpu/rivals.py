"""Block-sparse products of other libraries on the same weight. Each function raises where it cannot serve."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .plan import LayerCell
from .timing import Call

_STK_BLOCK = 128


def why_absent(name: str, device: torch.device) -> str | None:
    """Why a rival takes no part at all, or None."""
    if device.type != "cuda":
        return "needs a GPU"
    if name == "stk" and importlib.util.find_spec("stk") is None:
        return "stk is not installed"
    return None


def why_unfit(name: str, cell: LayerCell) -> str | None:
    """Why a rival cannot compute this layer, or None. STK's tiles are fixed and unguarded: others would be read
    out of bounds."""
    if name == "stk" and (cell.block != _STK_BLOCK or cell.m % _STK_BLOCK):
        return f"only blocks of {_STK_BLOCK}, and tokens in multiples of them"
    if cell.n % cell.block or cell.k % cell.block:
        return "no partial blocks"
    return None


def bsr(x: Tensor, weight: Tensor, grad: Tensor, block: int) -> dict[str, Call]:
    """PyTorch's Triton product of a BSR matrix, untuned as it comes. Its result is ``[N, M]``, which favours it."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    matrix = weight.to_sparse_bsr((block, block))
    out = grad.new_empty(grad.shape[::-1])
    xt = x.t()

    def forward() -> Tensor:
        return bsr_dense_addmm(out, matrix, xt, beta=0, out=out).t()

    return {"forward": forward}


def stk(x: Tensor, weight: Tensor, grad: Tensor, block: int) -> dict[str, Call]:
    """The kernels of MegaBlocks (package ``stanford-stk``); its grad-weight returns the active blocks alone."""
    import stk as library

    matrix = library.ops.to_sparse(weight, block)
    transposed, grad_t = matrix.t(), grad.t()
    return {
        "forward": lambda: library.ops.dds(x, transposed),
        "grad-input": lambda: library.ops.dds(grad, matrix),
        "grad-weight": lambda: library.ops.sdd(grad_t, x, matrix),
    }


RIVALS = {"bsr": bsr, "stk": stk}
