"""The schedule of one sparsity from the first step to the last."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .attention import Attention
from .checks import check_share, check_sparsity, check_step, check_steps
from .growth import Growth
from .patterns import Pattern
from .schedule import Schedule, check_parts, cosine, take_plain_parts


@dataclass(frozen=True)
class Constant(Schedule):
    """One sparsity from the first step to the last; drop-and-grow every ``interval`` steps unless growth is ``"none"``.

    ``growth="gradient"`` is RigL (arXiv 1911.11134), ``"random"`` is SET (arXiv 1707.04780), ``"mixed"`` the rule of
    :class:`MixedSparsity`, ``"none"`` a static random mask.

    Args:
        sparsity: share of zeros, in [0, 1).
        growth, gradient_share, gradient_steps, distribution, drop_fraction: as in :class:`MixedSparsity`.
        interval: steps between topology events.
        total_steps: if given, the drop fraction is annealed to 0 by a cosine over three quarters of it and the
            topology rests after that (RigL's choice).
        attention, stride, span: as in :class:`MixedSparsity`.
        attention_window: first step with the sparse pattern and first step without it again; default every step.

    Raises:
        ScheduleError: a value is out of range.
    """

    sparsity: float
    growth: str | Growth = "mixed"
    interval: int = 100
    drop_fraction: float = 0.3
    gradient_share: float = 0.75
    gradient_steps: int = 1
    distribution: str = "erdos-renyi"
    total_steps: int | None = None
    attention: str | Pattern | Attention = "full"
    attention_window: tuple[int, int] | None = None
    stride: int = 128
    span: int | None = None

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # plain values, whatever kind of number was given
        put("sparsity", check_sparsity("sparsity", self.sparsity))
        put("interval", check_steps("interval", self.interval))
        if self.total_steps is not None:
            put("total_steps", check_steps("total_steps", self.total_steps))
        put("drop_fraction", check_share("drop_fraction", self.drop_fraction))
        take_plain_parts(self)
        check_parts(self, self.interval)

    @property
    def max_sparsity(self) -> float:  # type: ignore[override]
        return self.sparsity

    @property
    def min_sparsity(self) -> float:  # type: ignore[override]
        return self.sparsity

    @property
    def last_event(self) -> int | None:
        return None if self.total_steps is None else self.total_steps * 3 // 4

    def sparsity_at(self, step: int) -> float:
        """Target share of zeros: the same at every step."""
        check_step(step)
        return self.sparsity

    def drop_fraction_at(self, step: int) -> float:
        """Share of the active blocks to drop and regrow at an event after ``step`` steps."""
        step = check_step(step)
        if not self.growth_rule.moves:
            return 0.0
        if self.last_event is None:
            return self.drop_fraction
        return cosine(self.drop_fraction, step, max(1, self.last_event))

    def is_topology_event(self, step: int) -> bool:
        """Whether the topology changes after the ``step``-th optimizer step."""
        step = check_step(step)
        if not self.growth_rule.moves or step < 1 or (self.last_event is not None and step > self.last_event):
            return False
        return step % self.interval == 0
