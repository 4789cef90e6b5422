"""The schedule that begins dense, or less sparse, and prunes gradually."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mst_compile.errors import ScheduleError

from .checks import check_length, check_share, check_sparsity, check_step, check_steps
from .growth import Growth
from .schedule import Schedule, check_parts, cosine, take_plain_parts


@dataclass(frozen=True)
class GradualPruning(Schedule):
    """Gradual magnitude pruning, with regrowth after each pruning unless growth is ``"none"``; ends sparse.

    Sparsity rises along ``s_f + (s_i - s_f)(1 - (t - t_0) / (t_f - t_0))**3`` ("To prune, or not to prune", arXiv
    1710.01878). At each event a layer is pruned down to its density by magnitude; then a share of what is
    left is dropped by magnitude and as many blocks grow, "zero-cost neuroregeneration" (GraNet, arXiv 2106.10404), by
    gradient. Pruning ends at ``end``; regrowth goes on to the end of the run, its share annealed to 0
    by a cosine. Layers have the densities of ``distribution`` (GraNet's threshold is one for all layers).

    Args:
        total_steps: optimizer steps of the whole run.
        sparsity: share of zeros at the end, in [0, 1).
        initial_sparsity: at the beginning; 0 prunes from dense to sparse, 0.5 is GraNet's from sparse to sparse.
        start, end: where pruning begins and ends, shares of ``total_steps`` if floats, numbers of steps if ints.
        interval: steps between events; default ``total_steps / 25``, within 1 to 100.
        drop_fraction: share of the blocks left after pruning that is dropped and regrown.
        growth, gradient_share, gradient_steps, distribution, magnitude, regrown, regrown_warmup: as in
            :class:`~mst_compile.rules.mixed_sparsity.MixedSparsity`; ``growth="none"`` is gradual magnitude pruning
            alone.

    Raises:
        ScheduleError: a value is out of range, or two contradict each other.
    """

    total_steps: int
    sparsity: float = 0.9
    initial_sparsity: float = 0.0
    start: float | int = 0.0
    end: float | int = 0.3
    interval: int | None = None
    drop_fraction: float = 0.5
    growth: str | Growth = "gradient"
    gradient_share: float = 0.75
    gradient_steps: int = 1
    distribution: str = "erdos-renyi"
    magnitude: str = "l2"
    drop_after_pruning: bool = True
    regrown: str = "first estimate"
    regrown_warmup: int = 0

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # plain values, whatever kind of number was given
        put("total_steps", check_steps("total_steps", self.total_steps))
        for name in ("sparsity", "initial_sparsity"):
            put(name, check_sparsity(name, getattr(self, name)))
        if self.initial_sparsity > self.sparsity:
            raise ScheduleError(
                f"initial_sparsity {self.initial_sparsity} is above sparsity {self.sparsity}: pruning rises to it"
            )
        for name in ("start", "end"):
            put(name, check_length(name, getattr(self, name)))
        if self.interval is not None:
            put("interval", check_steps("interval", self.interval))
        put("drop_fraction", check_share("drop_fraction", self.drop_fraction))
        if not self.start_step < self.end_step <= self.total_steps:
            raise ScheduleError(
                f"pruning must begin before it ends, within total_steps={self.total_steps}; it begins at step "
                f"{self.start_step} (start={self.start!r}) and ends at {self.end_step} (end={self.end!r})"
            )
        take_plain_parts(self)
        check_parts(self, self.interval_steps, self.total_steps)

    @property
    def start_step(self) -> int:
        """First step of the pruning."""
        return round(self.start * self.total_steps) if isinstance(self.start, float) else self.start

    @property
    def end_step(self) -> int:
        """Step of the event that lands on ``sparsity``."""
        return round(self.end * self.total_steps) if isinstance(self.end, float) else self.end

    @property
    def interval_steps(self) -> int:
        return self.interval or min(100, max(1, self.total_steps // 25))

    @property
    def max_sparsity(self) -> float:  # type: ignore[override]
        return self.sparsity

    @property
    def min_sparsity(self) -> float:  # type: ignore[override]
        return self.initial_sparsity

    def sparsity_at(self, step: int) -> float:
        """Target share of zeros after ``step`` optimizer steps."""
        step = check_step(step)
        if step >= self.end_step:
            return self.sparsity
        left = 1.0 - max(0, step - self.start_step) / (self.end_step - self.start_step)
        return self.sparsity + (self.initial_sparsity - self.sparsity) * left**3

    def drop_fraction_at(self, step: int) -> float:
        """Share of the blocks left after pruning to drop and regrow at an event after ``step`` steps."""
        step = check_step(step)
        return cosine(self.drop_fraction, max(0, step), self.total_steps) if self.growth_rule.moves else 0.0

    def is_topology_event(self, step: int) -> bool:
        """Whether the topology changes after the ``step``-th optimizer step."""
        step = check_step(step)
        if step < max(1, self.start_step) or (step >= self.total_steps and step != self.end_step):
            return False
        if step == self.end_step:
            return True
        return (step < self.end_step or self.growth_rule.moves) and (step - self.start_step) % self.interval_steps == 0

    def event_ranges(self, end: int) -> list[range]:
        """As :meth:`is_topology_event`, all at once."""
        stop, every, last = check_step(end) + 1, self.interval_steps, self.end_step
        first = self.start_step if self.start_step > 0 else every
        pruning = range(first, min(last, self.total_steps, stop), every)
        if not self.growth_rule.moves:
            return [pruning, range(last, min(last + 1, stop))]
        after = last + 1 + (self.start_step - last - 1) % every
        return [pruning, range(last, min(last + 1, stop)), range(after, min(self.total_steps, stop), every)]

    def phases(self, steps: int) -> list[tuple[str, int, int]]:
        """Before the pruning, the pruning, and after it, without those that have no steps, cut at ``steps``."""
        steps = check_step(steps)
        edges = [0, self.start_step, self.end_step, steps]
        names = ["before pruning", "pruning", "after pruning"]
        found = [(n, min(a, steps), min(b, steps)) for n, a, b in zip(names, edges[:-1], edges[1:], strict=True)]
        return [(name, a, b) for name, a, b in found if b > a]
