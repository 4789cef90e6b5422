"""Which blocks are active: first masks, drop and grow. Pure functions on tensors, all on the CPU.

Block scores are ``float32 [R, C]``, block masks ``bool [R, C]``, both in the weight's stored orientation.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from mst_compile.errors import ScheduleError

from .checks import check_share
from .growth import Growth, largest


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """A CPU generator that is a function of (seed, step, parameter name) alone.

    Never of call order, rank or device: every rank of a run, resumed or not, draws the same numbers.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    g = torch.Generator("cpu")
    g.manual_seed(int.from_bytes(digest[:7], "little"))
    return g


def random_mask(backbone: Tensor, count: int, gen: torch.Generator) -> Tensor:
    """``count`` active blocks: the ``backbone`` and a uniform random choice of the others."""
    if count >= backbone.numel():
        return torch.ones_like(backbone)
    score = torch.rand(backbone.shape, generator=gen, dtype=torch.float32, device="cpu")  # whatever the defaults are
    score[backbone] = 2.0
    return largest(score, count)


def magnitude_mask(safe: Tensor, count: int, magnitude: Tensor) -> Tensor:
    """``count`` active blocks: the ``safe`` ones, which must be no more, and the others of largest ``magnitude``."""
    if count >= safe.numel():
        return torch.ones_like(safe)
    return largest(magnitude.masked_fill(safe, torch.inf), count)


def update_mask(
    mask: Tensor,
    safe: Tensor,
    magnitude: Tensor,
    gradient: Tensor | None,
    count: int,
    drop_fraction: float,
    growth: Growth,
    gen: torch.Generator,
) -> Tensor:
    """One topology event of one weight: drop by magnitude, then grow to ``count`` active blocks.

    Dropped are the ``max(drop_fraction * active, active - count)`` active blocks of smallest ``magnitude``, except
    ``safe`` ones.

    Args:
        mask: bool ``[R, C]``, the active blocks before the event.
        magnitude, gradient: float ``[R, C]`` scores; ``gradient`` is None where growth reads none.
        safe: bool ``[R, C]``, blocks that are not dropped.
        count: active blocks after the event, unless more of them are safe.
        growth: chooses what grows.

    Raises:
        ScheduleError: ``growth`` chose something else than it was asked for, or ``drop_fraction`` is no share.
    """
    drop_fraction = check_share("drop_fraction_at(step) of the schedule", drop_fraction)
    if count >= mask.numel():
        return torch.ones_like(mask)
    active = int(mask.count_nonzero())
    coming = int((safe & ~mask).count_nonzero())  # of a given mask, which may lack some of the backbone
    drop = max(round(drop_fraction * active), active + coming - count)
    drop = min(drop, active - int((safe & mask).count_nonzero()))
    score = magnitude.masked_fill(safe, torch.inf).masked_fill(~mask, -torch.inf)
    kept = largest(score, active - drop) | safe
    wanted = count - int(kept.count_nonzero())
    if wanted <= 0:
        return kept
    grown = growth.grow(~kept, wanted, gradient, gen)
    right = isinstance(grown, Tensor) and grown.dtype == torch.bool and grown.shape == mask.shape
    if not right or bool((grown & kept).any()) or int(grown.count_nonzero()) != wanted:
        got = f"{int(grown.sum())}, some of them active" if right else f"{grown!r:.100}"
        raise ScheduleError(
            f"{growth!r} must choose {wanted} inactive blocks as a bool mask of {tuple(mask.shape)}, got {got}"
        )
    return kept | grown


def following_mask(mask: Tensor, magnitude: Tensor, count: int, safe: Tensor) -> Tensor:
    """``count`` blocks for values that came without their mask: those that are not 0, else the largest of them.

    Args:
        mask: bool ``[R, C]``, the active blocks before; they fill up where fewer blocks than ``count`` are not 0, as
            blocks that have just grown are.
        magnitude: float ``[R, C]``, of the values.
        safe: bool ``[R, C]``, at most ``count`` blocks to keep whatever they hold, if not all that are not 0 fit.
    """
    score = magnitude.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if int((score > 0).count_nonzero()) > count:
        return largest(score.masked_fill(safe, torch.inf), count)
    return largest((score > 0).float() * 2 + mask.float(), count)
