"""What a run will do, before it happens: in stretches of steps that are alike, however many there are."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mst_compile.cost.flops import elements_per_token
from mst_compile.rules.density import active_count
from mst_compile.rules.events import Events
from mst_compile.rules.schedule import Schedule, events_of
from mst_compile.state.sparsifier import Sparsifier

_MOST = 1 << 15  # of the stretches between events that are looked at; of more, equally many apart


@dataclass(frozen=True)
class Timeline:
    """A run before it happens, in stretches of alike steps; one entry a stretch in each tensor, on the CPU.

    Attributes:
        start, stop: first step, and first step after it, int64 ``[n]``. They fill the run without gaps, unless it has
            so many events that stretches are left out, which are like their neighbours.
        active: elements of all sparse weights in active blocks, float64 ``[n]``.
        gradient: elements of their gradients that are computed, float64 ``[n]``.
        events: steps after which the topology changes; up to the last that the run looks ahead to.
        schedule: that of the run.
    """

    start: Tensor
    stop: Tensor
    active: Tensor
    gradient: Tensor
    events: Events
    schedule: Schedule

    def share(self, start: int, stop: int) -> Tensor:
        """How many of the steps from ``start`` to ``stop`` each stretch stands for, float64 ``[n]``."""
        inside = (self.stop.clamp(max=stop) - self.start.clamp(min=start)).clamp(min=0).double()
        seen = float(inside.sum())
        if not seen and stop > start:  # less than lies between two stretches: the one before stands for it
            inside[max(0, int(torch.searchsorted(self.start, start, right=True)) - 1)] = seen = 1.0
        return inside * ((stop - start) / seen) if seen else inside

    def events_in(self, start: int, stop: int) -> int:
        """How many of the steps from ``start`` to ``stop`` a topology event follows."""
        return self.events.until(stop) - self.events.until(start)

    def patterned(self, start: int, stop: int) -> int:
        """In how many of the steps from ``start`` to ``stop`` attention has a pattern."""
        schedule = self.schedule
        if schedule.attention_value.name == "full":
            return 0
        if getattr(schedule.attention_at, "__func__", None) is not Schedule.attention_at:
            return sum(schedule.attention_at(step) != "full" for step in range(start, stop))
        first, end = schedule.attention_steps()
        return max(0, min(end, stop) - max(first, start))


def timeline(own: Sparsifier, steps: int) -> Timeline:
    """The first ``steps`` training steps under the schedule of ``own``; its own step count does not matter.

    The schedule is asked where something changes, at up to ``2**15`` events.
    """
    schedule, total = own.schedule, elements_per_token(own)
    events = events_of(schedule, steps + max(1, schedule.growth_rule.gradient_steps) - 1)
    inside = events.until(steps - 1)
    gaps = range(0, inside + 1, 1 + inside // _MOST)  # number i begins with event i - 1, the first with the run
    edges = [(events[i - 1] if i else 0, events[i] if i < inside else steps) for i in gaps]
    targets = [schedule.sparsity_at(first) for first, _ in edges]
    found = _active_at(own, set(targets))
    stretches: list[tuple[int, int, float, float]] = []
    for (first, end), target in zip(edges, targets, strict=True):
        dense = end
        while dense > first and schedule.wants_gradient_after(dense - 1):
            dense -= 1
        stretches += [(first, dense, found[target], found[target])] if dense > first else []
        stretches += [(dense, end, found[target], total)] if end > dense else []
    start, stop, active, gradient = zip(*stretches, strict=True)
    whole, real = (functools.partial(torch.tensor, dtype=dtype, device="cpu") for dtype in (torch.int64, torch.float64))
    return Timeline(whole(start), whole(stop), real(active), real(gradient), events, schedule)


def _active_at(own: Sparsifier, sparsities: set[float]) -> dict[float, float]:
    """Active elements of all sparse weights that a token meets at each target sparsity; ragged blocks count as the mean
    block."""
    weights = list(own.weights.values())
    # How few blocks a weight can have is asked once: it means counting its backbone.
    sizes = [(w.grid.matrix.blocks, w.blocks_at(0.0), w.numel * w.per_token / w.grid.matrix.blocks) for w in weights]
    return {
        sparsity: sum(
            active_count(density, blocks, least) * size
            for density, (blocks, least, size) in zip(own.densities(sparsity), sizes, strict=True)
        )
        for sparsity in sparsities
    }
