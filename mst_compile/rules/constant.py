"""The schedule of one sparsity from the first step to the last."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mst_compile.errors import ScheduleError

from .attention import Attention
from .checks import check_choice, check_share, check_sparsity, check_step, check_steps
from .growth import Growth
from .patterns import Pattern
from .schedule import Schedule, check_parts, cosine, take_plain_parts

_INTERVAL = 100
ANNEALINGS = ("cosine", "none")


@dataclass(frozen=True)
class Constant(Schedule):
    """One sparsity from the first step to the last; drop-and-grow every ``interval`` steps unless growth is ``"none"``.

    ``growth="gradient"`` is RigL (arXiv 1911.11134), ``"random"`` is SET (arXiv 1707.04780), ``"mixed"`` the rule of
    :class:`MixedSparsity`, ``"none"`` a static random mask. :mod:`mst_compile.recipes` has published choices.

    Args:
        sparsity: share of zeros, in [0, 1).
        growth, gradient_share, gradient_steps, distribution, drop_fraction: as in :class:`MixedSparsity`.
        interval: steps between topology events.
        total_steps: if given, topology events end, and the drop fraction is annealed to 0 by a cosine, after three
            quarters of it (RigL's choice), or as ``until`` and ``anneal`` say.
        attention, stride, span: as in :class:`MixedSparsity`.
        attention_window: first step with the sparse pattern and first step without it again; default every step.
        magnitude: ``"l2"`` or ``"l1"``, what of a block decides whether it is dropped.
        events: number of equal parts that the steps with topology events are divided into, an event after each, in
            place of ``interval``. None is at the very end of the run, which would come to nothing.
        until: share of ``total_steps`` over which there are topology events.
        anneal: ``"cosine"`` or ``"none"``: the drop fraction stays.
        regrown, regrown_warmup: as in :class:`MixedSparsity`.

    Raises:
        ScheduleError: a value is out of range, or two contradict each other.
    """

    sparsity: float
    growth: str | Growth = "mixed"
    interval: int = _INTERVAL
    drop_fraction: float = 0.3
    gradient_share: float = 0.75
    gradient_steps: int = 1
    distribution: str = "erdos-renyi"
    total_steps: int | None = None
    attention: str | Pattern | Attention = "full"
    attention_window: tuple[int, int] | None = None
    stride: int = 128
    span: int | None = None
    magnitude: str = "l2"
    events: int | None = None
    until: float = 0.75
    anneal: str = "cosine"
    regrown: str = "first estimate"
    regrown_warmup: int = 0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # plain values, whatever kind of number was given
        put("sparsity", check_sparsity("sparsity", self.sparsity))
        put("interval", check_steps("interval", self.interval))
        if self.total_steps is not None:
            put("total_steps", check_steps("total_steps", self.total_steps))
        put("drop_fraction", check_share("drop_fraction", self.drop_fraction))
        put("until", float(check_share("until", self.until)))
        check_choice("anneal", self.anneal, ANNEALINGS)
        if self.events is not None:
            put("events", check_steps("events", self.events))
        self._check_end()
        take_plain_parts(self)
        check_parts(self, self.interval if self.events is None else (self.last_event or 0) // self.events)

    def _check_end(self) -> None:
        if self.total_steps is None:
            given = {"events": self.events is not None, "until": self.until != 0.75, "anneal": self.anneal != "cosine"}
            name = next((name for name, there in given.items() if there), None)
            if name is not None:
                raise ScheduleError(
                    f"{name}={getattr(self, name)!r} needs to know total_steps, which is None; give the run's length"
                )
        if self.events is None:
            return
        if self.interval != _INTERVAL:
            raise ScheduleError(
                f"events={self.events} say how far apart they are, and so does interval={self.interval}: leave one out"
            )
        if self.events > (self.last_event or 0):
            raise ScheduleError(
                f"events={self.events} do not fit into the {self.last_event} steps that have any "
                f"(until={self.until:g} of total_steps={self.total_steps})"
            )

    @property
    def max_sparsity(self) -> float:  # type: ignore[override]
        return self.sparsity

    @property
    def min_sparsity(self) -> float:  # type: ignore[override]
        return self.sparsity

    @property
    def last_event(self) -> int | None:
        return None if self.total_steps is None else int(self.total_steps * self.until)

    def sparsity_at(self, step: int) -> float:
        """Target share of zeros: the same at every step."""
        check_step(step)
        return self.sparsity

    def drop_fraction_at(self, step: int) -> float:
        """Share of the active blocks to drop and regrow at an event after ``step`` steps."""
        step = check_step(step)
        if not self.growth_rule.moves:
            return 0.0
        if self.last_event is None or self.anneal == "none":
            return self.drop_fraction
        return cosine(self.drop_fraction, step, max(1, self.last_event))

    def event_ranges(self, end: int) -> list[range]:
        """As :meth:`is_topology_event`, all at once."""
        stop = check_step(end) + 1
        last = stop - 1 if self.last_event is None else min(stop - 1, self.last_event)
        if not self.growth_rule.moves:
            return []
        if self.events is None or self.last_event is None:
            return [range(self.interval, last + 1, self.interval)]
        steps = (i * self.last_event // self.events for i in range(1, self.events + 1))
        return [range(t, t + 1) for t in steps if t <= last and t != self.total_steps]

    def is_topology_event(self, step: int) -> bool:
        """Whether the topology changes after the ``step``-th optimizer step."""
        step, last = check_step(step), self.last_event
        if not self.growth_rule.moves or step < 1:
            return False
        if last is not None and (step > last or (self.events is not None and step == self.total_steps)):
            return False
        if self.events is None or last is None:
            return step % self.interval == 0
        part = -(-step * self.events // last)  # the first that ends at this step or after it
        return part * last // self.events == step
