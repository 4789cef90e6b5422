"""Which blocks are active: first masks, drop and grow. Pure functions on tensors, all on the CPU.

Block scores are ``float32 [R, C]``, block masks ``bool [R, C]``, both in the weight's stored orientation.
"""

from __future__ import annotations

import hashlib

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


def random_mask(backbone: Tensor, count: int, gen: torch.Generator) -> Tensor:
    """``count`` active blocks: the ``backbone`` and a uniform random choice of the others."""
    if count >= backbone.numel():
        return torch.ones_like(backbone)
    score = torch.rand(backbone.shape, generator=gen)
    score[backbone] = 2.0
    return _top(score, count)


def magnitude_mask(backbone: Tensor, count: int, magnitude: Tensor) -> Tensor:
    """``count`` active blocks: the backbone and the others of largest ``magnitude``."""
    if count >= backbone.numel():
        return torch.ones_like(backbone)
    return _top(magnitude.masked_fill(backbone, torch.inf), count)


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
