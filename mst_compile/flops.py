"""Count floating-point operations; a multiply-add counts as two.

The operators of this package are known to ``torch.utils.flop_counter.FlopCounterMode``, which then counts what the
kernels compute: active blocks, and the pairs that an attention pattern allows. Mind what that counter sees: under it
Dynamo leaves functions as they are, so a compiled model runs, and counts, its dense products. :class:`Meter` counts a
sparse run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from . import attention_op, ops  # noqa: F401  (registers torch.ops.mst)
from .api import sparsifier
from .blockindex import DENSE_GRAD, BlockGrid, read_mask
from .patterns import allowed
from .weights import SparseWeight


def linear_training(weight: SparseWeight, *, dense_grad: bool = False) -> int:
    """FLOPs per token of forward, grad-input and grad-weight of one sparse weight.

    Args:
        dense_grad: grad-weight on all blocks, as on the steps before a topology event that grows by gradient.
    """
    return 4 * weight.active + 2 * (weight.numel if dense_grad else weight.active)


class Meter:
    """Adds up the training FLOPs of a run, step by step, from the masks as they are.

    Call :meth:`step` once before each training step's forward pass::

        meter = Meter(model, tokens_per_step=8 * 1024, rest=forecast.rest)
        for batch in loader:
            meter.step()
            ...
        print(meter.flops)

    Args:
        model: a sparsified model.
        tokens_per_step: tokens of one optimizer step.
        rest: FLOPs of a step in everything but the products with sparse weights.

    Raises:
        NotSparseError: the model is not sparse.
    """

    def __init__(self, model: nn.Module, tokens_per_step: int, rest: float = 0.0) -> None:
        self._sparsifier = sparsifier(model)
        self.tokens_per_step = tokens_per_step
        self.rest = rest
        self.flops = 0.0
        self.steps = 0

    def step(self) -> None:
        """Count the step that comes."""
        weights = self._sparsifier.weights.values()
        self.flops += self.tokens_per_step * sum(linear_training(w, dense_grad=w.dense_grad) for w in weights)
        self.flops += self.rest
        self.steps += 1


def _active(index: Tensor, rows: int, cols: int, block: int) -> int:
    """Elements in the active blocks of a packed index; all where the index has no data (while a graph is traced)."""
    if isinstance(index, FakeTensor) or index.is_meta:
        return rows * cols
    grid = BlockGrid(rows, cols, block)
    return grid.count_elements(read_mask(index, grid))


def _tokens(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


@register_flop_formula(torch.ops.mst.linear, get_raw=True)
def _linear(x: Tensor, weight: Tensor, bias: Any, index: Tensor, block: int, *_: Any, **__: Any) -> int:
    return 2 * _tokens(x) * _active(index, weight.shape[0], weight.shape[1], block)


@register_flop_formula(torch.ops.mst.linear_grad_input, get_raw=True)
def _grad_input(grad: Tensor, weight: Tensor, index: Tensor, block: int, *_: Any, **__: Any) -> int:
    return 2 * _tokens(grad) * _active(index, weight.shape[0], weight.shape[1], block)


@register_flop_formula(torch.ops.mst.linear_grad_weight, get_raw=True)
def _grad_weight(grad: Tensor, x: Tensor, index: Tensor, block: int, transposed: bool, *_: Any, **__: Any) -> int:
    rows, cols = (x.shape[-1], grad.shape[-1]) if transposed else (grad.shape[-1], x.shape[-1])
    dense = not isinstance(index, FakeTensor) and bool(index[DENSE_GRAD])
    return 2 * _tokens(grad) * (rows * cols if dense else _active(index, rows, cols, block))


def _pairs(q: Tensor, blocks: Tensor | None, pattern: str, window: int, stride: int) -> int:
    """Query-key pairs that a pattern allows in one head."""
    return int(allowed(pattern, int(q.shape[2]), window, stride, blocks).sum())


@register_flop_formula(torch.ops.mst.attention, get_raw=True)
def _attention(
    q: Tensor,
    k: Any,
    v: Any,
    key_mask: Any,
    blocks: Tensor | None,
    pattern: str,
    window: int,
    stride: int,
    *_: Any,
    **__: Any,
) -> int:
    """Two products over the pattern's pairs; padding is not looked at."""
    return 4 * q.shape[0] * q.shape[1] * q.shape[3] * _pairs(q, blocks, pattern, window, stride)


@register_flop_formula(torch.ops.mst.attention_backward, get_raw=True)
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Any,
    lse: Any,
    key_mask: Any,
    blocks: Any,
    pattern: str,
    window: int,
    stride: int,
    *_: Any,
    **__: Any,
) -> int:
    """Five products: the scores anew, and the gradients of values, probabilities, queries and keys (as PyTorch counts
    its own ``scaled_dot_product`` kernels)."""
    return 10 * q.shape[0] * q.shape[1] * q.shape[3] * _pairs(q, blocks, pattern, window, stride)
