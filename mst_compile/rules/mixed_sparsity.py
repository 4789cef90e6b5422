"""The schedule of Mixed Sparsity Training: warm-up, ultra-sparsification, restoration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mst_compile.errors import ScheduleError

from .attention import Attention
from .checks import check_choice, check_length, check_share, check_sparsity, check_step, check_steps
from .growth import Growth
from .patterns import Pattern
from .schedule import Schedule, check_parts, cosine, take_plain_parts

RAMPS = ("mirrored", "early")
# Who chooses for ``auto``: this room knows no models and no costs, so whoever does says so here.
advisers: list[Callable[..., MixedSparsity]] = []


@dataclass(frozen=True)
class MixedSparsity(Schedule):
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
            sparsity does); or a rule of :mod:`mst_compile.rules.growth`, or your own.
        gradient_share: share of the growth that goes by gradient under ``"mixed"``; 3 of 4 in the paper.
        gradient_steps: steps before an event whose gradient scores are added up for growth; each of them computes
            dense gradients.
        distribution: ``"erdos-renyi"`` or ``"uniform"`` densities over the layers.
        initial_sparsity: sparsity at step 0, where the warm-up begins; default 0. Without a warm-up the schedule
            starts at ``sparsity``.
        restoration_ramp: ``"mirrored"`` (the paper's: most weights return late) or ``"early"`` (most return early;
            costs more FLOPs, lets them train longer).
        magnitude: ``"l2"`` or ``"l1"``, what of a block decides whether it is dropped.
        attention: pattern of causal self-attention inside ``attention_window``; outside it attention is full ("Hybrid
            Sparse Attention"). A name of :mod:`mst_compile.rules.patterns`, a pattern of
            your own, or an
            :class:`~mst_compile.rules.attention.Attention`, which holds the next three too. Takes effect under
            ``backend="mst"``.
        attention_window: first step with the sparse pattern and first step without it again, each a share of
            ``total_steps`` if a float, a number of steps if an int; default the plateau.
        stride: of the patterns, in positions.
        span: number of last keys that ``"local"`` and ``"sparse"`` attend to; default ``stride``.
        regrown: how the optimizer's moments of blocks that grow begin. ``"first estimate"``: the second moment v at its
            first estimate, the first moment m at 0. ``"own steps"`` (SMET, arXiv 2606.00888): both at 0, and Adam,
            AdamW, NAdam, RAdam and Adamax correct their bias by the number k of steps that the block has taken since it
            grew, in place of the weight's; in Adam's case the update is
            ``lr * (m / (1 - beta1**k)) / (sqrt(v / (1 - beta2**k)) + eps)``. Other optimizers keep to the first, and a
            warning says so.
        regrown_warmup: steps over which the updates of a block that has grown rise linearly to their full size,
            weight decay included: the n-th of them is ``n / regrown_warmup`` of what the optimizer makes; 0 for none,
            100 in SMET.

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
    growth: str | Growth = "none"
    gradient_share: float = 0.75
    gradient_steps: int = 1
    distribution: str = "erdos-renyi"
    initial_sparsity: float | None = None
    restoration_ramp: str = "mirrored"
    attention: str | Pattern | Attention = "full"
    attention_window: tuple[float | int, float | int] | None = None
    stride: int = 128
    span: int | None = None
    magnitude: str = "l2"
    regrown: str = "first estimate"
    regrown_warmup: int = 0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # plain values, whatever kind of number was given
        put("total_steps", check_steps("total_steps", self.total_steps))
        put("sparsity", check_sparsity("sparsity", self.sparsity))
        if self.initial_sparsity is not None:
            put("initial_sparsity", check_sparsity("initial_sparsity", self.initial_sparsity))
        if self.initial_sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ScheduleError(
                f"initial_sparsity {self.initial_sparsity} is above sparsity {self.sparsity}: the warm-up rises to it"
            )
        for name, length in (("warmup", self.warmup), ("restoration", self.restoration), ("settle", self.settle)):
            put(name, check_length(name, length))
        for name, steps in (("interval", self.interval), ("ramp_interval", self.ramp_interval)):
            if steps is not None:
                put(name, check_steps(name, steps))
        put("drop_fraction", check_share("drop_fraction", self.drop_fraction))
        check_choice("restoration_ramp", self.restoration_ramp, RAMPS)
        used = self.warmup_steps + self.restoration_steps + self.settle_steps
        if used > self.total_steps:
            raise ScheduleError(
                f"the phases are longer than total_steps={self.total_steps}: warmup {self.warmup_steps} + restoration "
                f"{self.restoration_steps} + settle {self.settle_steps} = {used} steps; shorten one of them"
            )
        if self.restoration_end < 1:
            raise ScheduleError(f"total_steps={self.total_steps} leaves no step for the sparse phases; shorten settle")
        if self.initial_sparsity not in (None, self.sparsity) and self.warmup_steps == 0:
            raise ScheduleError(
                f"initial_sparsity={self.initial_sparsity!r} is where a warm-up begins, and warmup={self.warmup!r} is "
                f"none; give warmup steps, or leave initial_sparsity out and start at {self.sparsity!r}"
            )
        take_plain_parts(self)
        check_parts(self, self.plateau_interval, self.total_steps)

    @classmethod
    def published(cls, total_steps: int, sparsity: float = 0.9, **changes: Any) -> MixedSparsity:
        """The paper's choices: 90 % sparsity after a warm-up over a tenth of the run, drop-and-grow 3:1 by gradient and
        at random. ``changes`` are any other arguments."""
        chosen: dict[str, Any] = {"warmup": 0.1, "growth": "mixed"} | changes
        return cls(total_steps, sparsity, **chosen)

    @classmethod
    def auto(cls, model: object, **sizes: Any) -> MixedSparsity:
        """The schedule that :func:`mst_compile.recommend` chooses for ``model``; ``sizes`` are its arguments, of which
        ``tokens`` and ``tokens_per_step`` are needed. It ends dense.

        Raises:
            ForecastError: as ``recommend`` does; or the budget pays for dense training, which needs no schedule.
        """
        return advisers[-1](model, **sizes)

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

    def attention_steps(self) -> tuple[int, int]:
        """First step with the attention pattern, and first step without it again; by default the plateau's."""
        value = self.attention_value
        start = self.warmup_steps if value.start is None else self._steps(value.start)
        return start, self.restoration_start if value.end is None else self._steps(value.end)

    @property
    def plateau_interval(self) -> int:
        return self.interval or min(100, max(1, self.total_steps // 25))

    @property
    def ramp_interval_steps(self) -> int:
        return self.ramp_interval or max(1, self.plateau_interval // 2)

    @property
    def max_sparsity(self) -> float:  # type: ignore[override]
        return self.sparsity

    def sparsity_at(self, step: int) -> float:
        """Target share of zeros after ``step`` optimizer steps."""
        step = max(0, check_step(step))
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
        step = check_step(step)
        if not self.growth_rule.moves:
            return 0.0
        return cosine(self.drop_fraction, step, max(1, self.restoration_start))

    def is_topology_event(self, step: int) -> bool:
        """Whether the topology changes after the ``step``-th optimizer step."""
        step = check_step(step)
        if step < 1 or step > self.restoration_end:
            return False
        if step in (self.warmup_steps, self.restoration_end):
            return True
        if step < self.warmup_steps:
            return step % self.ramp_interval_steps == 0
        if step > self.restoration_start:
            return (self.restoration_end - step) % self.ramp_interval_steps == 0
        return self.growth_rule.moves and (step - self.warmup_steps) % self.plateau_interval == 0

    def event_ranges(self, end: int) -> list[range]:
        """As :meth:`is_topology_event`, all at once."""
        stop, ramp = min(check_step(end), self.restoration_end) + 1, self.ramp_interval_steps
        start, last = self.warmup_steps, self.restoration_end
        found = [range(ramp, min(start, stop), ramp), range(max(1, start), min(start + 1, stop))]
        if self.growth_rule.moves:
            every = self.plateau_interval
            found.append(range(start + every, min(self.restoration_start + 1, last, stop), every))
        rising = max(self.restoration_start, start) + 1
        found.append(range(rising + (last - rising) % ramp, min(last, stop), ramp))
        return [*found, range(last, stop)]

    def phases(self, steps: int) -> list[tuple[str, int, int]]:
        """Warm-up, plateau, restoration and settle, without those that have no steps, cut at ``steps``."""
        steps = check_step(steps)
        edges = [0, self.warmup_steps, self.restoration_start, self.restoration_end, steps]
        names = ["warm-up", "plateau", "restoration", "settle"]
        found = [(n, min(a, steps), min(b, steps)) for n, a, b in zip(names, edges[:-1], edges[1:], strict=True)]
        return [(name, a, b) for name, a, b in found if b > a]
