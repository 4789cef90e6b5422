"""Guards: blocks that a topology event may not drop, so that no row or column of blocks dies. Pure functions.

Magnitude alone empties whole block rows and columns, and they never come back (measured: docs/quality.md#guards).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Guard = Literal["coverage", "backbone", "none"]
GUARDS: tuple[str, ...] = get_args(Guard)


def backbone(shape: tuple[int, int]) -> Tensor:
    """The wrapped block diagonal, bool ``[R, C]``: ``max(R, C)`` blocks that touch every block row and column.

    First masks contain it. Without any guard magnitude pruning empties whole block rows and columns later, and where
    an up-projection's row and the matching column of the down-projection are both zero, both gradients are exactly
    zero: the pair is dead for ever.
    """
    rows, cols = shape
    mask = torch.zeros(shape, dtype=torch.bool, device="cpu")
    i = torch.arange(max(rows, cols), device="cpu")
    mask[i % rows, i % cols] = True
    return mask


def coverage(mask: Tensor, magnitude: Tensor) -> Tensor:
    """The active block of largest ``magnitude`` in each block row and each block column, bool ``[R, C]``.

    At most ``R + C - 1`` blocks. What keeps them keeps every row and column that has blocks alive, as the backbone
    does, but leaves it to training which ones.
    """
    score = magnitude.masked_fill(~mask, -torch.inf)
    best = torch.zeros_like(mask)
    for dim in (0, 1):
        best.scatter_(dim, score.argmax(dim, keepdim=True), True)
    return best & mask


def safe_among_all(guard: Guard, magnitude: Tensor, count: int, spine: Tensor) -> Tensor:
    """Blocks that a mask of ``count`` made from ``magnitude`` must have, bool ``[R, C]``: those of the guard as if all
    were active, or the backbone ``spine`` where they are more than that."""
    if guard == "coverage":
        safe = coverage(torch.ones_like(spine), magnitude)
        if int(safe.count_nonzero()) <= count:
            return safe
    return spine
