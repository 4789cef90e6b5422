"""What a schedule is: sparsity, topology events and attention over time, as pure functions of the step.

A *step* is the number of optimizer steps taken so far. A topology event may happen after an optimizer step; the
sparsity that it establishes is ``schedule.sparsity_at(step)``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from mst_compile.errors import ScheduleError

from .attention import Attention, as_attention
from .checks import (
    check_choice,
    check_flag,
    check_positions,
    check_share,
    check_sparsity,
    check_step,
    check_steps,
    check_whole,
    shown,
)
from .density import DISTRIBUTIONS
from .events import Events
from .growth import Growth, as_growth
from .patterns import Pattern

_NEVER = 2**63 - 1
MAGNITUDES = ("l2", "l1")
REGROWN = ("first estimate", "own steps")
_REQUIRED = ("max_sparsity", "sparsity_at", "is_topology_event")


class Schedule:
    """Base class of all schedules, and of your own. Every method is a pure function of the step.

    A subclass says ``max_sparsity``, ``sparsity_at`` and ``is_topology_event``; everything else has a default.

    Attributes:
        max_sparsity, min_sparsity: the highest and the lowest that ``sparsity_at`` gives.
        growth: a name (``"mixed"``, ``"gradient"``, ``"random"``, ``"none"``) or a
            :class:`~mst_compile.rules.growth.Growth`.
        gradient_share, gradient_steps: of a growth that is given by name.
        magnitude: what of a block decides whether it is dropped, ``"l2"`` or ``"l1"``: its mean square, or its mean
            absolute value.
        drop_after_pruning: where the density falls, :meth:`drop_fraction_at` is of the blocks that are left after
            pruning down to it, not of those before.
        distribution: ``"erdos-renyi"`` or ``"uniform"`` densities over the layers.
        attention: a pattern, by name or your own, or an :class:`~mst_compile.rules.attention.Attention`.
        attention_window, stride, span: of an attention that is given by name.
        regrown: how the optimizer's moments of regrown blocks begin: ``"first estimate"``, the second moment at its
            first estimate; or ``"own steps"``, both at 0, with bias corrections by the block's own number of steps.
            See :mod:`mst_compile.state.own_steps`.
        regrown_warmup: steps over which the updates of a regrown block rise linearly to their full size; 0: none.
    """

    max_sparsity: float
    min_sparsity: float = 0.0
    growth: str | Growth = "none"
    gradient_share: float = 0.75
    gradient_steps: int = 1
    magnitude: str = "l2"
    drop_after_pruning: bool = False
    distribution: str = "erdos-renyi"
    attention: str | Pattern | Attention = "full"
    attention_window: tuple[float | int, float | int] | None = None
    stride: int = 128
    span: int | None = None
    regrown: str = "first estimate"
    regrown_warmup: int = 0

    def sparsity_at(self, step: int) -> float:
        """Target share of zeros after ``step`` optimizer steps."""
        raise NotImplementedError

    def is_topology_event(self, step: int) -> bool:
        """Whether the topology changes after the ``step``-th optimizer step."""
        raise NotImplementedError

    def drop_fraction_at(self, step: int) -> float:
        """Share of the active blocks to drop and regrow at an event after ``step`` steps."""
        return 0.0

    def attention_at(self, step: int) -> str:
        """Attention pattern of the forward pass after ``step`` optimizer steps."""
        start, end = self.attention_steps()
        step = check_step(step)
        return self.attention_value.name if start <= step < end else "full"

    def attention_steps(self) -> tuple[int, int]:
        """First step with the attention pattern, and first step without it again."""
        value = self.attention_value
        if isinstance(value.start, float) or isinstance(value.end, float):
            raise ScheduleError(f"attention_window must be two numbers of steps, got {(value.start, value.end)!r}")
        return value.start or 0, _NEVER if value.end is None else value.end

    def event_ranges(self, end: int) -> list[range]:
        """The steps from 1 to ``end`` after which the topology changes, ascending.

        A class that has its own :meth:`is_topology_event` may say them at once beside it, for forecasts of long runs;
        otherwise every step is asked.
        """
        return [range(t, t + 1) for t in range(1, check_step(end) + 1) if self.is_topology_event(t)]

    def phases(self, steps: int) -> list[tuple[str, int, int]]:
        """Name, first step and end of each phase of a run of ``steps`` steps that has any."""
        steps = check_step(steps)
        return [("training", 0, steps)] if steps > 0 else []

    @functools.cached_property
    def growth_rule(self) -> Growth:
        """The growth, by name or not."""
        return as_growth(self.growth, self.gradient_share, self.gradient_steps)

    @functools.cached_property
    def attention_value(self) -> Attention:
        """The attention, by name or not."""
        return as_attention(self.attention, self.attention_window, self.stride, self.span)

    def wants_gradient_after(self, step: int) -> bool:
        """Whether the training step that follows ``step`` others computes gradients on all blocks."""
        step = check_step(step)
        return any(self.reads_gradient_at(step + 1 + i) for i in range(self.growth_rule.gradient_steps))

    def reads_gradient_at(self, step: int) -> bool:
        """Whether a topology event after ``step`` steps reads gradients: at sparsity 0 all grows, with no choice."""
        step = check_step(step)
        return self.growth_rule.gradient_steps > 0 and self.is_topology_event(step) and sparsity_of(self, step) > 0


def events_of(schedule: Schedule, end: int) -> Events:
    """The topology events of ``schedule`` from step 1 to step ``end``."""
    classes = type(schedule).__mro__
    first = next(cls for cls in classes if {"is_topology_event", "event_ranges"} & vars(cls).keys())
    # What a class inherits is not of the events that it says itself.
    said = "event_ranges" in vars(first) and "is_topology_event" not in getattr(schedule, "__dict__", {})
    return Events(schedule.event_ranges(end) if said else Schedule.event_ranges(schedule, end))


def sparsity_of(schedule: Schedule, step: int) -> float:
    """What ``schedule.sparsity_at(step)`` returns, which may be of the user's own making.

    Raises:
        ScheduleError: it is no share of zeros below 1.
    """
    return check_sparsity(f"sparsity_at({step}) of the schedule", schedule.sparsity_at(step))


def attention_of(schedule: Schedule, step: int) -> str:
    """What ``schedule.attention_at(step)`` returns.

    Raises:
        ScheduleError: it is neither ``"full"`` nor the name of the schedule's pattern.
    """
    known = dict.fromkeys(("full", schedule.attention_value.name))
    return check_choice(f"attention_at({step}) of the schedule", schedule.attention_at(step), known)


def phase_of(schedule: Schedule, step: int) -> str:
    """Name of the phase that training step number ``step``, from 0, belongs to; empty if the run is over by then."""
    total: object = getattr(schedule, "total_steps", None)
    steps = total if isinstance(total, int) else step + 1
    return next((name for name, first, end in schedule.phases(steps) if first <= step < end), "")


def take_plain_parts(schedule: Schedule) -> None:
    """Let a frozen schedule hold plain Python values of what all have in common, whatever kind of number was given."""
    put = functools.partial(object.__setattr__, schedule)
    put("gradient_share", check_share("gradient_share", schedule.gradient_share))
    put("gradient_steps", check_steps("gradient_steps", schedule.gradient_steps))
    put("stride", check_positions("stride", schedule.stride))
    if schedule.span is not None:
        put("span", check_positions("span", schedule.span))
    if isinstance(schedule.attention_window, list):
        put("attention_window", tuple(schedule.attention_window))
    put("regrown_warmup", _check_warmup(schedule))


def check_parts(schedule: Schedule, interval: int, total_steps: int | None = None) -> None:
    """Check what all schedules have in common.

    Args:
        interval: least number of steps between topology events that move blocks.
        total_steps: of the run, if known.

    Raises:
        ScheduleError: a value is out of range, or two contradict each other.
    """
    rule = schedule.growth_rule
    if isinstance(schedule.growth, Growth) and (schedule.gradient_share, schedule.gradient_steps) != (0.75, 1):
        raise ScheduleError(
            f"{rule!r} says its own share and gradient_steps: leave gradient_share={schedule.gradient_share!r} and "
            f"gradient_steps={schedule.gradient_steps!r} out"
        )
    named = as_growth("mixed", schedule.gradient_share, schedule.gradient_steps)  # the numbers of any named rule
    steps = max(rule.gradient_steps, named.gradient_steps)
    if steps > interval:
        raise ScheduleError(f"gradient_steps={steps} is more than the {interval} steps between topology events")
    check_choice("distribution", schedule.distribution, DISTRIBUTIONS)
    check_choice("magnitude", schedule.magnitude, MAGNITUDES)
    check_flag("drop_after_pruning", schedule.drop_after_pruning, ScheduleError)
    check_choice("regrown", schedule.regrown, REGROWN)
    _check_warmup(schedule)
    value, (start, end) = schedule.attention_value, _two_steps(schedule)
    asked = value.name != "full" or value.start is not None or value.end is not None
    if asked and start >= (end if total_steps is None else min(end, total_steps)):
        of = f" of {total_steps}" if total_steps else ""
        raise ScheduleError(
            f"attention {schedule.attention!r} would never be on: its first step is {start}{of}, and its first step "
            f"without the pattern is {end} (attention_window={schedule.attention_window!r})"
        )


def _check_warmup(schedule: Schedule) -> int:
    return check_whole("regrown_warmup", schedule.regrown_warmup, least=0, of="optimizer steps", error=ScheduleError)


def as_schedule(schedule: object) -> Schedule:
    """``schedule`` if it is one, or an object with a schedule's methods completed by the defaults.

    Raises:
        ScheduleError: it lacks a method or attribute that :class:`Schedule` has no default for, or one of its values
            is out of range.
    """
    missing = [name for name in _REQUIRED if getattr(schedule, name, None) is None or _inherited(schedule, name)]
    if isinstance(schedule, type) or missing:
        raise ScheduleError(
            f"{shown(schedule)} is not a schedule{_list(missing)}; pass mst_compile.MixedSparsity(total_steps=...), "
            "mst_compile.Constant(sparsity=...) or an object of a class derived from mst_compile.Schedule"
        )
    found = schedule if isinstance(schedule, Schedule) else _Adopted(schedule)
    for name in [name for name in vars(Schedule) if callable(getattr(Schedule, name)) and not name.startswith("_")]:
        if not callable(getattr(found, name)):
            raise ScheduleError(f"{name} of a schedule must be a method, got {shown(getattr(found, name))}")
    highest = check_sparsity("max_sparsity", found.max_sparsity)
    check_sparsity("min_sparsity", found.min_sparsity)
    check_parts(found, _NEVER)  # steps between events are known to a schedule alone
    _check_beginning(found, highest)
    return found


def _check_beginning(schedule: Schedule, highest: float) -> None:
    """Ask a schedule, before anything is changed, what will be asked of it first."""
    first = sparsity_of(schedule, 0)
    if first > highest:
        raise ScheduleError(
            f"sparsity_at(0) of the schedule is {first!r}, above its max_sparsity {highest!r}; max_sparsity is the "
            "highest value that sparsity_at returns"
        )
    check_share("drop_fraction_at(0) of the schedule", schedule.drop_fraction_at(0))
    attention_of(schedule, 0)
    schedule.wants_gradient_after(0)
    check_flag("is_topology_event(1) of the schedule", schedule.is_topology_event(1), ScheduleError)


def _two_steps(schedule: Schedule) -> tuple[int, int]:
    """The first and the last step of attention with a pattern, as the schedule says."""
    found: object = schedule.attention_steps()
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise ScheduleError(f"attention_steps() of the schedule must return two numbers of steps, got {shown(found)}")
    return check_step(found[0]), check_step(found[1])


def _inherited(schedule: object, name: str) -> bool:
    """Whether a subclass of :class:`Schedule` left a method to it that it does not have."""
    return isinstance(schedule, Schedule) and getattr(type(schedule), name, None) is getattr(Schedule, name, 0)


def _list(names: list[str]) -> str:
    return f" (it has no {', '.join(names)})" if names else ""


class _Adopted(Schedule):
    """An object with a schedule's methods whose class does not derive from :class:`Schedule`."""

    def __init__(self, schedule: object) -> None:
        self._adopted = schedule

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            adopted = object.__getattribute__(self, "_adopted")
            if hasattr(adopted, name):
                return getattr(adopted, name)
        return object.__getattribute__(self, name)


def cosine(peak: float, step: int, end: int) -> float:
    """``peak / 2 * (1 + cos(pi step / end))``, 0 from ``end`` on (the paper's annealing of the drop fraction)."""
    return 0.0 if step >= end else peak / 2 * (1 + math.cos(math.pi * step / end))
