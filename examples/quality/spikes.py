"""Does the training loss jump when the topology changes? One statistic, and a yardstick for it.

All runs of a seed see the same batches in the same order, so the dense run's loss, subtracted step by step, removes
most of the noise that comes from the data. On that difference ``d``, with ``d[k]`` the loss of the first forward pass
after ``k`` optimizer steps, the *rise* at step ``e`` is

    mean(d[e : e + after]) - mean(d[e - 20 : e])

An event after ``e`` steps acts on ``d[e]`` first. The yardstick is the same rise at the steps of the same run whose
windows hold no event. A run with too few of those is held against a control, a run whose topology never changes. The
largest rise over the events is called a spike if its distance from the mean of the yardstick's rises, in their standard
deviations, is more than chance gives the largest of that many events once in a hundred times. The first tenth of a run
is left out: the loss falls steeply there, and differently for different models.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BEFORE = 20
AFTER = (20, 5)  # a lasting rise, and a short one
ENOUGH = 40  # event-free steps that make a yardstick
CHANCE = 0.01


@dataclass(frozen=True)
class Spike:
    """The event after which the loss rose most.

    Attributes:
        step: of the event.
        rise: of the loss.
        z: the rise less the mean of event-free rises, in their standard deviations.
        threshold: of ``z``, beyond which it is more than chance.
        events: how many were looked at.
        own: whether the event-free steps are the run's own, or the control's.
    """

    step: int
    rise: float
    z: float
    threshold: float
    events: int
    own: bool

    @property
    def found(self) -> bool:
        """Whether the loss rose more than chance explains."""
        return self.z > self.threshold


def difference(losses: Sequence[float], dense: Sequence[float]) -> list[float]:
    """The run's loss less the dense run's, step by step."""
    return [a - b for a, b in zip(losses, dense, strict=True)]


def rise(curve: Sequence[float], step: int, after: int) -> float:
    """The statistic at one step."""
    return statistics.fmean(curve[step : step + after]) - statistics.fmean(curve[step - BEFORE : step])


def eligible(length: int, after: int) -> range:
    """Steps that are looked at: windows inside the run, the first tenth left out."""
    return range(max(BEFORE, length // 10), length - after + 1)


def free_steps(length: int, events: Sequence[int], after: int) -> list[int]:
    """Eligible steps whose windows no event touches."""
    taken = {step for event in events for step in range(event - after + 1, event + BEFORE)}
    return [step for step in eligible(length, after) if step not in taken]


def largest_rise(
    curve: Sequence[float], events: Sequence[int], after: int, control: Sequence[float] | None = None
) -> Spike | None:
    """The largest rise over all events, or ``None`` if there is no event or no yardstick.

    Args:
        curve: difference of the run to the dense run.
        events: steps after which the topology changed.
        after: steps after an event that count.
        control: the same difference of a run without events, for runs whose events stand too close.
    """
    inside = [e for e in events if e in eligible(len(curve), after)]
    yardstick = [rise(curve, s, after) for s in free_steps(len(curve), events, after)]
    own = len(yardstick) >= ENOUGH
    if not own:
        yardstick = [rise(control, s, after) for s in eligible(len(control), after)] if control is not None else []
    if not inside or len(yardstick) < ENOUGH:
        return None
    step = max(inside, key=lambda e: rise(curve, e, after))
    highest, deviation = rise(curve, step, after), statistics.stdev(yardstick)
    z = (highest - statistics.fmean(yardstick)) / deviation if deviation > 0 else 0.0
    threshold = statistics.NormalDist().inv_cdf(1 - CHANCE / len(inside))
    return Spike(step, highest, z, threshold, len(inside), own)
