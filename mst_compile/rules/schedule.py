"""Sparsity schedules: frozen dataclasses whose methods are pure functions of the step.

A *step* is the number of optimizer steps taken so far. A topology event may happen after an optimizer step; the
sparsity that it establishes is ``schedule.sparsity_at(step)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from mst_compile.errors import ScheduleError

Growth = Literal["mixed", "gradient", "random", "none"]
Distribution = Literal["erdos-renyi", "uniform"]
Ramp = Literal["mirrored", "early"]
Attention = Literal["full", "local", "strided", "sparse", "fixed"]

GROWTHS = ("mixed", "gradient", "random", "none")
DISTRIBUTIONS = ("erdos-renyi", "uniform")
RAMPS = ("mirrored", "early")
ATTENTIONS = ("full", "local", "strided", "sparse", "fixed")


@runtime_checkable
class Schedule(Protocol):
    """What :func:`mst_compile.sparsify` needs to know over time. Every method is a pure function of the step."""

    @property
    def growth(self) -> Growth: ...
    @property
    def gradient_share(self) -> float: ...
    @property
    def distribution(self) -> Distribution: ...
    @property
    def max_sparsity(self) -> float: ...
    @property
    def min_sparsity(self) -> float: ...
    def sparsity_at(self, step: int) -> float: ...
    def drop_fraction_at(self, step: int) -> float: ...
    def is_topology_event(self, step: int) -> bool: ...


@dataclass(frozen=True)
class MixedSparsity:
    """Mixed Sparsity Training: warm-up, ultra-sparsification, restoration (arXiv 2408.11746, "Sparsity Variation").

    Sparsity rises from ``initial_sparsity`` along the cubic ``s_f + (s_i - s_f)(1 - t/T)**3`` over the warm-up, stays
    at ``sparsity``, and falls back to 0 along the mirrored cubic. By default it starts sparse, at 80 %, and keeps its
    first masks until weights return: of what ends dense that was the best use of FLOPs in the short runs of our study;
    in longer ones 70 % was (docs/quality.md).
    :meth:`published` has the paper's choices. The last topology event lands on sparsity 0
    exactly; for the ``settle`` steps after it the model is dense.

    Args:
        total_steps: optimizer steps of the whole run.
        sparsity: share of zeros on the plateau, in [0, 1).
        warmup, restoration, settle: length of the rising phase, of the falling phase and of the dense tail: a share of
            ``total_steps`` if a float, a number of steps if an int. Let ``settle`` cover the decay of the learning
            rate: weights that come back under a decayed learning rate have no time to become useful.
        interval: steps between topology events on the plateau; default ``total_steps / 25``, within 1 to 100.
        ramp_interval: the same while sparsity changes; default ``interval / 2``, at least 1.
        drop_fraction: share of the active blocks dropped and regrown at an event, annealed to 0 by a cosine over
            warm-up and plateau.
        growth: ``"mixed"`` (``gradient_share`` by gradient magnitude, the rest at random; the paper's rule),
            ``"gradient"`` (RigL), ``"random"`` (SET) or ``"none"`` (no drop-and-grow: blocks change only as the
            sparsity does).
        gradient_share: share of the growth that goes by gradient under ``"mixed"``; 3 of 4 in the paper.
        gradient_steps: steps before an event whose gradient scores are added up for growth; each of them computes
            dense gradients.
        distribution: ``"erdos-renyi"`` or ``"uniform"`` densities over the layers.
        initial_sparsity: sparsity at step 0; default 0 if there is a warm-up, else ``sparsity``.
        restoration_ramp: ``"mirrored"`` (the paper's: most weights return late) or ``"early"`` (most return early;
            costs more FLOPs, lets them train longer).
        attention: pattern of causal self-attention inside ``attention_window``; outside it attention is full ("Hybrid
            Sparse Attention"). One of those in :mod:`mst_compile.rules.patterns`. Takes effect under ``backend="mst"``.
        attention_window: first step with the sparse pattern and first step without it again, each a share of
            ``total_steps`` if a float, a number of steps if an int; default the plateau.
        stride: of the patterns, in positions.
        span: number of last keys that ``"local"`` and ``"sparse"`` attend to; default ``stride``.

    Raises:
        ScheduleError: a value is out of range, or the phases do not fit into ``total_steps``.
    """

    total_steps: int
    sparsity: float = 0.8
    warmup: float | int = 0.0
    restoration: float | int = 0.1
    settle: float | int = 0.1
    interval: int | None = None
    ramp_interval: int | None = None
    drop_fraction: float = 0.3
    growth: Growth = "none"
    gradient_share: float = 0.75
    gradient_steps: int = 1
    distribution: Distribution = "erdos-renyi"
    initial_sparsity: float | None = None
    restoration_ramp: Ramp = "mirrored"
    attention: Attention = "full"
    attention_window: tuple[float | int, float | int] | None = None
    stride: int = 128
    span: int | None = None

    def __post_init__(self) -> None:
        _check_steps("total_steps", self.total_steps)
        check_sparsity("sparsity", self.sparsity)
        if self.initial_sparsity is not None:
            check_sparsity("initial_sparsity", self.initial_sparsity)
        if self.initial_sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ScheduleError(
                f"initial_sparsity {self.initial_sparsity} is above sparsity {self.sparsity}: the warm-up rises to it"
            )
        for name in ("warmup", "restoration", "settle"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ScheduleError(
                    f"{name} must be a share of total_steps (float) or a number of steps (int), got {value!r}"
                )
            if isinstance(value, float) and value > 1:
                raise ScheduleError(f"{name}={value!r} is a share above 1; pass an int for a number of steps")
        for name in ("interval", "ramp_interval"):
            if getattr(self, name) is not None:
                _check_steps(name, getattr(self, name))
        _check_common(self.drop_fraction, self.growth, self.gradient_share, self.distribution)
        _check_gradient_steps(self.gradient_steps, self.plateau_interval)
        _check_choice("restoration_ramp", self.restoration_ramp, RAMPS)
        used = self.warmup_steps + self.restoration_steps + self.settle_steps
        if used > self.total_steps:
            raise ScheduleError(
                f"the phases are longer than total_steps={self.total_steps}: warmup {self.warmup_steps} + restoration "
                f"{self.restoration_steps} + settle {self.settle_steps} = {used} steps; shorten one of them"
            )
        _check_attention(self.attention, self.attention_window, self.stride, self.span)
        if self.restoration_end < 1:
            raise ScheduleError(f"total_steps={self.total_steps} leaves no step for the sparse phases; shorten settle")

    @classmethod
    def published(cls, total_steps: int, sparsity: float = 0.9, **changes: Any) -> MixedSparsity:
        """The paper's choices: 90 % sparsity after a warm-up over a tenth of the run, drop-and-grow 3:1 by gradient and
        at random. ``changes`` are any other arguments."""
        chosen: dict[str, Any] = {"warmup": 0.1, "growth": "mixed"} | changes
        return cls(total_steps, sparsity, **chosen)

    def _steps(self, length: float | int) -> int:
        return round(length * self.total_steps) if isinstance(length, float) else length

    @property
    def warmup_steps(self) -> int:
        return self._steps(self.warmup)

    @property
    def restoration_steps(self) -> int:
        return self._steps(self.restoration)

    @property
    def settle_steps(self) -> int:
        return self._steps(self.settle)

    @property
    def restoration_start(self) -> int:
        """First step after the plateau."""
        return self.restoration_end - self.restoration_steps

    @property
    def restoration_end(self) -> int:
        """Step of the last topology event, which lands on sparsity 0."""
        return self.total_steps - self.settle_steps

    def attention_at(self, step: int) -> Attention:
        """Attention pattern of the forward pass after ``step`` optimizer steps."""
        start, end = self.attention_window or (self.warmup_steps, self.restoration_start)
        return self.attention if self._steps(start) <= step < self._steps(end) else "full"

    @property
    def plateau_interval(self) -> int:
        return self.interval or min(100, max(1, self.total_steps // 25))

    @property
    def ramp_interval_steps(self) -> int:
        return self.ramp_interval or max(1, self.plateau_interval // 2)

    @property
    def max_sparsity(self) -> float:
        return self.sparsity

    @property
    def min_sparsity(self) -> float:
        return 0.0

    def sparsity_at(self, step: int) -> float:
        """Target share of zeros after ``step`` optimizer steps."""
        if step >= self.restoration_end:
            return 0.0
        if step > self.restoration_start:
            t = (step - self.restoration_start) / self.restoration_steps
            return self.sparsity * ((1 - t**3) if self.restoration_ramp == "mirrored" else (1 - t) ** 3)
        if step >= self.warmup_steps:
            return self.sparsity
        t = step / self.warmup_steps
        return self.sparsity + ((self.initial_sparsity or 0.0) - self.sparsity) * (1 - t) ** 3

    def drop_fraction_at(self, step: int) -> float:
        """Share of the active blocks to drop and regrow at an event after ``step`` steps."""
        return _cosine(self.drop_fraction, step, max(1, self.restoration_start)) if self.growth != "none" else 0.0

    def is_topology_event(self, step: int) -> bool:
        """Whether the topology changes after the ``step``-th optimizer step."""
        if step < 1 or step > self.restoration_end:
            return False
        if step in (self.warmup_steps, self.restoration_end):
            return True
        if step < self.warmup_steps:
            return step % self.ramp_interval_steps == 0
        if step > self.restoration_start:
            return (self.restoration_end - step) % self.ramp_interval_steps == 0
        return self.growth != "none" and (step - self.warmup_steps) % self.plateau_interval == 0


@dataclass(frozen=True)
class Constant:
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
    growth: Growth = "mixed"
    interval: int = 100
    drop_fraction: float = 0.3
    gradient_share: float = 0.75
    gradient_steps: int = 1
    distribution: Distribution = "erdos-renyi"
    total_steps: int | None = None
    attention: Attention = "full"
    attention_window: tuple[int, int] | None = None
    stride: int = 128
    span: int | None = None

    def __post_init__(self) -> None:
        check_sparsity("sparsity", self.sparsity)
        _check_steps("interval", self.interval)
        if self.total_steps is not None:
            _check_steps("total_steps", self.total_steps)
        _check_common(self.drop_fraction, self.growth, self.gradient_share, self.distribution)
        _check_gradient_steps(self.gradient_steps, self.interval)
        _check_attention(self.attention, self.attention_window, self.stride, self.span)
        if any(isinstance(edge, float) for edge in self.attention_window or ()):
            raise ScheduleError(f"attention_window must be two numbers of steps, got {self.attention_window!r}")

    def attention_at(self, step: int) -> Attention:
        """Attention pattern of the forward pass after ``step`` optimizer steps."""
        if self.attention_window is None:
            return self.attention
        start, end = self.attention_window
        return self.attention if start <= step < end else "full"

    @property
    def max_sparsity(self) -> float:
        return self.sparsity

    @property
    def min_sparsity(self) -> float:
        return self.sparsity

    @property
    def last_event(self) -> int | None:
        return None if self.total_steps is None else self.total_steps * 3 // 4

    def sparsity_at(self, step: int) -> float:
        """Target share of zeros: the same at every step."""
        return self.sparsity

    def drop_fraction_at(self, step: int) -> float:
        """Share of the active blocks to drop and regrow at an event after ``step`` steps."""
        if self.growth == "none":
            return 0.0
        return (
            self.drop_fraction
            if self.last_event is None
            else _cosine(self.drop_fraction, step, max(1, self.last_event))
        )

    def is_topology_event(self, step: int) -> bool:
        """Whether the topology changes after the ``step``-th optimizer step."""
        if self.growth == "none" or step < 1 or (self.last_event is not None and step > self.last_event):
            return False
        return step % self.interval == 0


def gradient_steps(schedule: Schedule) -> int:
    """Steps whose gradients growth reads; a schedule of a user's own that says nothing of it reads one."""
    return getattr(schedule, "gradient_steps", 1)


def attention_pattern(schedule: Schedule, step: int) -> str:
    """Attention pattern after ``step`` steps; full under a schedule of a user's own that says nothing of it."""
    return schedule.attention_at(step) if hasattr(schedule, "attention_at") else "full"


def check_schedule(schedule: object) -> Schedule:
    """Return ``schedule`` if it is one.

    Raises:
        ScheduleError: it lacks a method or attribute of :class:`Schedule`.
    """
    if isinstance(schedule, type) or not isinstance(schedule, Schedule):
        raise ScheduleError(
            f"{schedule!r} is not a schedule; pass mst_compile.MixedSparsity(total_steps=...), "
            "mst_compile.Constant(sparsity=...) or an object with the methods of mst_compile.schedule.Schedule"
        )
    return schedule


def check_sparsity(name: str, value: object) -> None:
    """Raise :class:`ScheduleError` unless ``value`` is a share of zeros."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ScheduleError(f"{name} must lie in [0, 1), got {value!r}: it is the share of zeros, 0.9 keeps one in ten")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ScheduleError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_steps(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(f"{name} must be a whole number of optimizer steps, at least 1, got {value!r}")


def _check_common(drop_fraction: float, growth: str, gradient_share: float, distribution: str) -> None:
    for name, value in (("drop_fraction", drop_fraction), ("gradient_share", gradient_share)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ScheduleError(f"{name} must lie in [0, 1], got {value!r}")
    _check_choice("growth", growth, GROWTHS)
    _check_choice("distribution", distribution, DISTRIBUTIONS)


def _check_gradient_steps(steps: object, interval: int) -> None:
    _check_steps("gradient_steps", steps)
    if steps > interval:  # type: ignore[operator]
        raise ScheduleError(f"gradient_steps={steps} is more than the {interval} steps between topology events")


def _check_attention(attention: str, window: object, stride: object, span: object) -> None:
    _check_choice("attention", attention, ATTENTIONS)
    for name, value in (("stride", stride), ("span", 1 if span is None else span)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ScheduleError(f"{name} must be a whole number of positions, at least 1, got {value!r}")
    if window is None:
        return
    edges = list(window) if isinstance(window, tuple | list) else []
    if len(edges) != 2 or not all(_is_moment(edge) for edge in edges):
        raise ScheduleError(
            "attention_window must be the first sparse step and the first full step after it, shares of the run as "
            f"floats in [0, 1] or numbers of steps, got {window!r}"
        )
    if type(edges[0]) is type(edges[1]) and edges[0] >= edges[1]:
        raise ScheduleError(f"attention_window {window!r} is empty: the first step must lie before the second")


def _is_moment(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= (1 if isinstance(value, float) else math.inf)


def _cosine(peak: float, step: int, end: int) -> float:
    """``peak / 2 * (1 + cos(pi step / end))``, 0 from ``end`` on (the paper's annealing of the drop fraction)."""
    return 0.0 if step >= end else peak / 2 * (1 + math.cos(math.pi * step / end))
