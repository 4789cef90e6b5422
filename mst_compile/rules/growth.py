"""Growth rules: which blocks become active when a topology event grows some. One class a rule, pure functions.

A rule says what it reads and picks blocks; how many grow, and which are dropped first, is the schedule's affair. A rule
of your own derives from :class:`Growth` and is passed to a schedule in place of a name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mst_compile.errors import ScheduleError

from .checks import check_choice, check_flag, check_instance, check_share, check_steps, check_whole, shown


class Growth(ABC):
    """A growth rule.

    Attributes:
        moves: whether drop-and-grow happens at all; if not, blocks change only as the sparsity does.
        gradient_steps: steps before an event whose dense gradients :meth:`grow` reads; 0 if it reads none.
    """

    moves: bool = True
    gradient_steps: int = 0

    @abstractmethod
    def grow(self, inactive: Tensor, count: int, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        """The blocks that become active.

        Args:
            inactive: bool ``[R, C]``, the blocks to choose from: at least ``count``. One dropped a moment ago is among
                them, as in the published rule.
            count: how many to choose.
            gradient: float32 ``[R, C]``, mean square of the gradient over each block, added up over the steps that the
                rule reads; None where nothing was read, as when the model is about to become dense.
            generator: on the CPU, the same on all ranks; draw from nothing else.

        Returns:
            bool ``[R, C]`` with ``count`` of ``inactive``.
        """


@dataclass(frozen=True)
class NoGrowth(Growth):
    """No drop-and-grow. Where the schedule lets the density rise, blocks return at random."""

    moves = False

    def grow(self, inactive: Tensor, count: int, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        _check_question(inactive, count, gradient, generator)
        return at_random(inactive, count, generator)


@dataclass(frozen=True)
class SET(Growth):
    """At random (SET, arXiv 1707.04780)."""

    def grow(self, inactive: Tensor, count: int, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        _check_question(inactive, count, gradient, generator)
        return at_random(inactive, count, generator)


@dataclass(frozen=True)
class Mixed(Growth):
    """``share`` of the blocks by gradient magnitude, the others at random among the rest (Mixed Growing, arXiv
    2408.11746).

    Args:
        share: in [0, 1]; 3 of 4 in the paper.
        gradient_steps: steps before an event whose gradient scores are added up; each computes dense gradients.

    Raises:
        ScheduleError: a value is out of range.
    """

    share: float = 0.75
    gradient_steps: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_share("gradient_share", self.share))
        object.__setattr__(self, "gradient_steps", check_steps("gradient_steps", self.gradient_steps))

    def grow(self, inactive: Tensor, count: int, gradient: Tensor | None, generator: torch.Generator) -> Tensor:
        _check_question(inactive, count, gradient, generator)
        by_gradient = 0 if gradient is None else round(count * self.share)
        chosen = torch.zeros_like(inactive)
        if by_gradient and gradient is not None:
            chosen = largest(gradient.masked_fill(~inactive, -torch.inf), by_gradient)
        if count > by_gradient:
            chosen = chosen | at_random(inactive & ~chosen, count - by_gradient, generator)
        return chosen


@dataclass(frozen=True)
class RigL(Mixed):
    """By gradient magnitude alone (RigL, arXiv 1911.11134)."""

    share: float = field(default=1.0, init=False)


RULES: dict[str, type[Growth]] = {"mixed": Mixed, "gradient": RigL, "random": SET, "none": NoGrowth}


def as_growth(growth: str | Growth, share: float = 0.75, gradient_steps: int = 1) -> Growth:
    """The rule of a name, or the rule itself.

    Args:
        share: of ``"mixed"``.
        gradient_steps: of the named rules that read gradients.

    Raises:
        ScheduleError: there is no such rule, or a value is out of range.
    """
    if isinstance(growth, Growth):
        check_flag(f"moves of {growth!r}", growth.moves, ScheduleError)
        check_whole(f"gradient_steps of {growth!r}", growth.gradient_steps, least=0, of="optimizer steps")
        return growth
    if isinstance(growth, type) and issubclass(growth, Growth):
        raise ScheduleError(f"growth must be a rule, got the class {growth!r}: pass {growth.__name__}(...)")
    kind = RULES[check_choice("growth", growth, RULES)]
    if kind is Mixed:
        return Mixed(share, gradient_steps)
    return RigL(gradient_steps=gradient_steps) if kind is RigL else kind()


def _check_question(inactive: Tensor, count: int, gradient: Tensor | None, generator: torch.Generator) -> None:
    """Raise :class:`ScheduleError` unless these are arguments of :meth:`Growth.grow`."""
    blocks = isinstance(inactive, Tensor) and inactive.dtype == torch.bool and inactive.dim() == 2
    if not blocks:
        raise ScheduleError(f"inactive must be a bool mask [R, C] of blocks, got {shown(inactive)}")
    check_whole("count", count, least=0, most=int(inactive.count_nonzero()), of="inactive blocks")
    if gradient is not None and (not isinstance(gradient, Tensor) or gradient.shape != inactive.shape):
        raise ScheduleError(f"gradient must be scores of shape {tuple(inactive.shape)}, or None, got {shown(gradient)}")
    check_instance("generator", generator, torch.Generator, "a torch.Generator", ScheduleError)


def at_random(among: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of the blocks ``among``, each as likely as any other: bool ``[R, C]``."""
    return largest(
        torch.rand(among.shape, generator=generator, dtype=torch.float32, device="cpu").masked_fill(~among, -1.0), count
    )


def largest(score: Tensor, count: int) -> Tensor:
    """The ``count`` blocks of largest ``score``: bool of its shape."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    if count > 0:
        flat = score.flatten()
        among = _shortlist(flat, count)
        chosen = (flat if among is None else flat[among]).topk(count, sorted=False).indices
        mask[chosen if among is None else among[chosen]] = True
    return mask.view(score.shape)


def _shortlist(score: Tensor, count: int) -> Tensor | None:
    """Positions of some more than the ``count`` largest of very many scores, ``[N]``; None where all are candidates.

    Fine blocks are millions: to look only at those that a sample says may be among the largest is several times faster.
    """
    if score.numel() < 2**18 or count > score.numel() // 2:
        return None
    sample = score[:: score.numel() // 2**14]
    rank = math.ceil(count / score.numel() * sample.numel() * 1.1) + 128  # more than the sample errs by
    if rank > sample.numel():
        return None
    among = (~(score < sample.topk(rank).values.min())).nonzero()[:, 0]
    return among if count <= among.numel() else None
