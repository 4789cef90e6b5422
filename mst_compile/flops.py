"""Count the floating-point operations of linear layers; a multiply-add counts as two."""

from __future__ import annotations

from .weights import SparseWeight


def linear_training(weight: SparseWeight, *, dense_grad: bool = False) -> int:
    """FLOPs per token of forward, grad-input and grad-weight of one sparse weight.

    Args:
        dense_grad: grad-weight on all blocks, as on the step before a topology event that grows by gradient.
    """
    return 4 * weight.active + 2 * (weight.numel if dense_grad else weight.active)
