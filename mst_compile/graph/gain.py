"""Whether a graph with sparse products is faster than one with dense ones, by the times of its products."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from mst_compile.lowering.device import WORTH, LayerTimes

SlotTimes = Sequence[Sequence[LayerTimes]]
"""For each sparse weight of a graph, the times of each layer with it."""

_LEAST = 0.05  # of the time of the dense products: what the sparse ones must save together
_STEPS = 100


def saves(slots: SlotTimes, densities: Sequence[float], chooses: bool) -> bool:
    """Whether sparse products save time at the densities of the weights.

    Args:
        chooses: whether a product that is faster dense runs dense in the graph with sparse ones too. It costs its call
            there all the same. Where nothing is known of any product, sparse ones run.
    """
    every = [(t, density) for layers, density in zip(slots, densities, strict=True) for x in layers for t in x.values()]
    dense = sum(times.dense for times, _ in every)
    least = _LEAST if chooses else 1 - WORTH
    saved = sum(
        times.saved(density)
        for times, density in every
        if density < times.crossover or not (chooses and times.falls_back)
    )
    return not every or saved - sum(times.call for times, _ in every) > least * dense


def uniform_threshold(slots: SlotTimes, chooses: bool) -> float:
    """The density from which sparse products save nothing if all weights have it; infinite if there is none."""

    def is_dense(step: int) -> bool:
        return not saves(slots, [step / _STEPS] * len(slots), chooses)

    first = bisect.bisect_left(range(_STEPS + 1), True, key=is_dense)  # what is saved only falls with the density
    return first / _STEPS if first <= _STEPS else math.inf
