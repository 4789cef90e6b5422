"""Dense against sparse: what a forecast says about whether a run is worth it as it is planned."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mst_compile.cost.rates import Rates

_TOLERANCE = 0.01  # of steps against total_steps: epochs are rounded
_EATEN = 0.5  # the share of what FLOPs promise of which less is left in time
_LITTLE = 1.05  # a speed-up that is none
_WIDTH = 100


@dataclass(frozen=True)
class Decision:
    """What :class:`~mst_compile.Forecast` comes to.

    Attributes:
        flops, dense_flops: training FLOPs of the run, and of the dense model over as many steps.
        seconds, dense_seconds: of both, None if no rates are known. The dense model is the one in which nothing is
            sparse, as Inductor runs it by itself: ``source`` says so, or what else was measured in its place.
        cost, dense_cost: money, None without ``price_per_hour``.
        limit: how many times as fast the fastest step could be at most, however sparse: what is not in products with
            sparse weights takes its time (Amdahl's law). Infinite if there is nothing else.
        limit_in_seconds: whether that is from seconds at several densities; else it is from FLOPs.
        source: where seconds come from, measured and estimated apart.
        notes: what does not fit, or eats the gain; empty if nothing does.
    """

    flops: float
    dense_flops: float
    seconds: float | None
    dense_seconds: float | None
    cost: float | None
    dense_cost: float | None
    limit: float
    limit_in_seconds: bool
    source: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float | None:
        """Dense seconds over sparse ones, of the whole run."""
        if self.seconds is None or self.dense_seconds is None:
            return None
        return self.dense_seconds / self.seconds if self.seconds > 0 else float("inf")

    def __str__(self) -> str:
        saved = self.dense_flops / max(1.0, self.flops)
        lines = [f"FLOPs: dense {self.dense_flops:.4g}, sparse {self.flops:.4g}: {saved:.2f} times fewer"]
        if self.seconds is not None and self.dense_seconds is not None:
            lines.append(f"time: dense {_time(self.dense_seconds)}, sparse {_time(self.seconds)}: {self.speedup:.2f}x")
        if self.cost is not None and self.dense_cost is not None:
            lines.append(f"cost: dense {self.dense_cost:.2f}, sparse {self.cost:.2f}")
        kind = "time" if self.limit_in_seconds else "FLOPs"
        at_most = f"no sparsity makes a step more than {self.limit:.2f}x as fast"
        if math.isinf(self.limit):
            at_most = "none, since nothing was counted beside the products with sparse weights"
        lines.append(f"limit (Amdahl, by {kind}): {at_most}")
        lines += [f"seconds are: {text}" for text in self.source]
        lines += [f"NOTE: {note}" for note in self.notes]
        return "\n".join(line for text in lines for line in textwrap.wrap(text, _WIDTH, subsequent_indent="    "))


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 3600 else f"{seconds / 3600:.2f} h"


def amdahl(dense: float, rest: float) -> float:
    """How many times as fast a step can be that takes ``dense`` in all and ``rest`` in what sparsity leaves alone."""
    return dense / rest if rest > 0 else float("inf")


def step_limit(rates: Rates, moved: float, moved_rest: float) -> float:
    """As :func:`amdahl`, in seconds; ``moved`` of all gradients of sparse weights, ``moved_rest`` of the others."""
    beside = rates.optimizer + moved_rest
    return amdahl(rates.baseline + beside + moved, max(0.0, rates.fixed) + beside)


def disagreement(steps: int, total_steps: int | None, tokens_per_step: float) -> list[str]:
    """A note if the run has another length than the schedule."""
    if total_steps is None or abs(steps - total_steps) <= max(1.0, _TOLERANCE * total_steps):
        return []
    what = (
        f"{steps - total_steps} steps ({(steps - total_steps) / steps:.0%}) run after the schedule's end"
        if steps > total_steps
        else f"the run ends {total_steps - steps} steps before the schedule does, with the density of that moment"
    )
    return [
        f"tokens and total_steps disagree: the tokens are {steps} steps of {tokens_per_step:.0f} tokens, the "
        f"schedule has {total_steps}; {what}. Take total_steps={steps}, or tokens={total_steps * tokens_per_step:.0f}"
    ]


def eaten(flops_ratio: float, speedup: float | None, limit: float) -> list[str]:
    """Notes on a gain that is small, or smaller than FLOPs promise."""
    if speedup is None:
        return [f"what stays dense limits a step to {limit:.2f}x"] if limit < 1 / _EATEN else []
    if speedup < 1:
        return [f"sparse training would take longer than dense training ({speedup:.2f}x)"]
    if speedup < _LITTLE:
        return [f"sparse training would save next to no time ({speedup:.2f}x)"]
    if speedup - 1 < _EATEN * (flops_ratio - 1):
        return [
            f"the rest of a step eats the gain: {flops_ratio:.2f} times fewer FLOPs make {speedup:.2f}x in time "
            f"(at most {limit:.2f}x a step)"
        ]
    return []
