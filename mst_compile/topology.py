"""Which blocks are active: densities per layer, guards, drop and grow. Pure functions on tensors, all on the CPU.

Block scores are ``float32 [R, C]``, block masks ``bool [R, C]``, both in the weight's stored orientation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """A CPU generator that is a function of (seed, step, parameter name) alone.

    Never of call order, rank or device: every rank of a run, resumed or not, draws the same numbers.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    g = torch.Generator()
    g.manual_seed(int.from_bytes(digest[:7], "little"))
    return g


def uniform(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[float]:
    """The same density, ``1 - sparsity``, for each layer."""
    return [1.0 - sparsity] * len(shapes)


def erdos_renyi(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[float]:
    """Density of each layer proportional to ``(rows + cols) / (rows * cols)``, ``1 - sparsity`` over all elements.

    Layers whose density would exceed 1 are kept dense and the others are scaled again (SET, arXiv 1707.04780;
    as in the reference implementation of Mixed Sparsity Training).
    """
    dense: set[int] = set()
    total = sum(r * c for r, c in shapes)
    while True:
        budget = (1.0 - sparsity) * total - sum(shapes[i][0] * shapes[i][1] for i in dense)
        rest = {i: (r + c) / (r * c) for i, (r, c) in enumerate(shapes) if i not in dense}
        if not rest:
            return [1.0] * len(shapes)
        scale = budget / sum(shapes[i][0] + shapes[i][1] for i in rest)
        if scale * max(rest.values()) <= 1.0:
            return [1.0 if i in dense else scale * rest[i] for i in range(len(shapes))]
        top = max(rest.values())
        dense |= {i for i, raw in rest.items() if raw == top}


Guard = Literal["coverage", "backbone", "none"]
GUARDS: tuple[str, ...] = get_args(Guard)
DISTRIBUTIONS = {"erdos-renyi": erdos_renyi, "uniform": uniform}


def layer_densities(
    shapes: Sequence[tuple[int, int]],
    sparsity: float,
    distribution: str,
    overrides: Sequence[float | None],
    max_sparsity: float,
) -> list[float]:
    """Target density of each layer.

    Layers with an override have that sparsity when the schedule is at ``max_sparsity``, and the same share of it as
    the schedule has of its own at other times. The others meet ``sparsity`` among themselves.
    """
    free = [i for i, override in enumerate(overrides) if override is None]
    found = dict(zip(free, DISTRIBUTIONS[distribution]([shapes[i] for i in free], sparsity), strict=True))
    share = sparsity / max_sparsity if max_sparsity > 0 else 0.0
    return [found[i] if override is None else 1.0 - override * share for i, override in enumerate(overrides)]


def backbone(shape: tuple[int, int]) -> Tensor:
    """The wrapped block diagonal, bool ``[R, C]``: ``max(R, C)`` blocks that touch every block row and column.

    First masks contain it. Without any guard magnitude pruning empties whole block rows and columns later, and where
    an up-projection's row and the matching column of the down-projection are both zero, both gradients are exactly
    zero: the pair is dead for ever.
    """
    rows, cols = shape
    mask = torch.zeros(shape, dtype=torch.bool)
    i = torch.arange(max(rows, cols))
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


def active_count(density: float, blocks: int, least: int) -> int:
    """Number of active blocks for a target density; never fewer than ``least`` (the size of the backbone)."""
    return min(blocks, max(least, round(density * blocks)))


def random_mask(spine: Tensor, count: int, gen: torch.Generator) -> Tensor:
    """``count`` active blocks: the backbone ``spine`` and a uniform random choice of the others."""
    if count >= spine.numel():
        return torch.ones_like(spine)
    score = torch.rand(spine.shape, generator=gen)
    score[spine] = 2.0
    return _top(score, count)


def magnitude_mask(spine: Tensor, count: int, magnitude: Tensor) -> Tensor:
    """``count`` active blocks: the backbone and the others of largest ``magnitude``."""
    if count >= spine.numel():
        return torch.ones_like(spine)
    return _top(magnitude.masked_fill(spine, torch.inf), count)


def update_mask(
    mask: Tensor,
    safe: Tensor,
    magnitude: Tensor,
    gradient: Tensor | None,
    count: int,
    drop_fraction: float,
    gradient_share: float,
    gen: torch.Generator,
) -> Tensor:
    """One topology event of one weight: drop by magnitude, then grow to ``count`` active blocks.

    Dropped are the ``max(drop_fraction * active, active - count)`` active blocks of smallest ``magnitude``, except
    ``safe`` ones. Grown are first the inactive blocks of largest ``gradient`` score (a ``gradient_share``
    of the growth), then others at random. As in the published rule a block dropped now may be grown again at once.

    Args:
        mask: bool ``[R, C]``, the active blocks before the event.
        magnitude, gradient: float ``[R, C]`` scores; without ``gradient`` all growth is random.
        safe: bool ``[R, C]``, blocks that are not dropped.
        count: active blocks after the event, unless more of them are safe.
    """
    if count >= mask.numel():
        return torch.ones_like(mask)
    active = int(mask.sum())
    drop = min(max(round(drop_fraction * active), active - count), active - int((safe & mask).sum()))
    score = magnitude.masked_fill(safe, torch.inf).masked_fill(~mask, -torch.inf)
    kept = _top(score, active - drop) | safe
    grow = count - int(kept.sum())
    if grow <= 0:
        return kept
    by_gradient = 0 if gradient is None else round(grow * gradient_share)
    if by_gradient and gradient is not None:
        kept = kept | _top(gradient.masked_fill(kept, -torch.inf), by_gradient)
    if grow > by_gradient:
        kept = kept | _top(torch.rand(mask.shape, generator=gen).masked_fill(kept, -1.0), grow - by_gradient)
    return kept


def _top(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    if count > 0:
        mask[score.flatten().topk(count, sorted=False).indices] = True
    return mask.view(score.shape)
