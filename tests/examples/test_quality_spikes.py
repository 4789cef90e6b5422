"""The study's statistic of spikes at topology events, against curves whose spikes are known."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from quality import spikes

EVENTS = list(range(48, 1000, 48))


def curve(seed: int) -> list[float]:
    """What a difference of losses looks like: a slow drift, and noise."""
    gauss = random.Random(seed)
    return [0.3 - 0.0001 * k + gauss.gauss(0, 0.02) for k in range(1000)]


@pytest.mark.parametrize("after", spikes.AFTER)
def test_noise_is_no_spike(after: int) -> None:
    found = [spikes.largest_rise(curve(seed), EVENTS, after) for seed in range(20)]
    assert all(spike is not None and spike.own for spike in found)
    assert sum(spike is not None and spike.found for spike in found) <= 1


@pytest.mark.parametrize(("after", "length"), [(20, 30), (5, 4)])
def test_a_planted_spike_is_found(after: int, length: int) -> None:
    for seed in range(20):
        planted = curve(seed)
        for k in range(480, 480 + length):
            planted[k] += 0.06
        spike = spikes.largest_rise(planted, EVENTS, after)
        assert spike is not None
        assert spike.found
        assert spike.step == 480
        assert spike.rise == pytest.approx(0.06 * min(length, after) / after, abs=0.02)


def test_a_spike_away_from_events_is_none() -> None:
    planted = curve(0)
    for k in range(502, 506):
        planted[k] += 0.06
    spike = spikes.largest_rise(planted, EVENTS, 5)
    assert spike is not None
    assert not spike.found


def test_close_events_need_a_control() -> None:
    close = list(range(4, 1000, 4))
    assert spikes.largest_rise(curve(0), close, 20) is None
    spike = spikes.largest_rise(curve(0), close, 20, control=curve(1))
    assert spike is not None
    assert not spike.own
    assert not spike.found
    assert spikes.largest_rise(curve(0), [], 20, control=curve(1)) is None
