"""Forecasts of runs that are longer than what one can count through."""

from __future__ import annotations

import pytest
from helpers import Blocks

from mst_compile import Constant, MixedSparsity, sparsifier, sparsify
from mst_compile.cost import timeline as timelines
from mst_compile.cost.forecast import ACTIVE, EVENTS, GRADIENT, PATTERN, SPARSE, STEPS, of_run
from mst_compile.cost.recommend import _mean_sparsity
from mst_compile.cost.timeline import timeline
from mst_compile.rules.schedule import Schedule
from mst_compile.schedule import GradualPruning

MILLION = 1_000_000
SCHEDULES = {
    "mixed": lambda n: MixedSparsity.published(n, 0.8, attention="sparse", stride=8),
    "some steps of gradients": lambda n: MixedSparsity(n, 0.8, growth="gradient", interval=40, gradient_steps=3),
    "constant": lambda n: Constant(0.8, interval=40, growth="mixed"),
    "gradual": lambda n: GradualPruning(n, 0.8, interval=40, growth="gradient"),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_stretches_are_the_steps(name: str) -> None:
    """Each step of a run, as the schedule says it."""
    steps, schedule = 700, SCHEDULES[name](700)
    own = sparsifier(sparsify(Blocks(), schedule))
    line, total = timeline(own, steps), sum(w.numel for w in own.weights.values())
    length = line.stop - line.start
    assert line.start.tolist() == [0, *line.stop[:-1].tolist()]
    assert line.stop[-1] == steps
    active, gradient = (values.repeat_interleave(length).tolist() for values in (line.active, line.gradient))
    now = active[0]
    for step in range(steps):
        changed = schedule.is_topology_event(step)
        assert changed or active[step] == now
        now = active[step]
        assert (gradient[step] == total) == (schedule.wants_gradient_after(step) or now == total)
        assert gradient[step] in (now, total)
        assert line.events_in(step, step + 1) == schedule.is_topology_event(step + 1)
        assert line.patterned(step, step + 1) == (schedule.attention_at(step) != "full")


@pytest.mark.parametrize("name", SCHEDULES)
def test_stretches_that_are_left_out_are_like_their_neighbours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 60_000
    own = sparsifier(sparsify(Blocks(), SCHEDULES[name](steps)))
    whole = of_run(own, steps, 8, 0.0).phases
    monkeypatch.setattr(timelines, "_MOST", 400)
    assert len(timeline(own, steps).start) < 1000
    for phase, exact in zip(of_run(own, steps, 8, 0.0).phases, whole, strict=True):
        for symbol in (STEPS, EVENTS, PATTERN):
            assert phase.values[symbol] == exact.values[symbol]
        for symbol in (ACTIVE, GRADIENT, SPARSE):
            # Of 400 stretches the first stands for its neighbours: a ramp is off by what it falls in one of them.
            assert phase.values[symbol] == pytest.approx(exact.values[symbol], rel=0.02)


class Counted(MixedSparsity):
    asked = 0

    def sparsity_at(self, step: int) -> float:
        Counted.asked += 1
        return super().sparsity_at(step)

    def attention_at(self, step: int) -> str:
        Counted.asked += 1
        return super().attention_at(step)


def test_work_does_not_grow_with_the_number_of_steps() -> None:
    found = []
    for steps in (MILLION, 10 * MILLION, 1000 * MILLION):
        schedule: Schedule = Counted.published(steps, 0.8)
        own = sparsifier(sparsify(Blocks(), schedule))
        Counted.asked = 0
        forecast = of_run(own, steps, 8, 0.0)
        found.append(Counted.asked)
        assert sum(phase.values[STEPS] for phase in forecast.phases) == steps
        assert forecast.flops / forecast.dense_flops == pytest.approx(0.322, abs=0.01)
    assert max(found) < 10 * (1 << 15), found


def test_the_mean_sparsity_of_a_long_run() -> None:
    """Of a plateau over 80 % and a cubic ramp over 10 %, which averages three quarters."""
    for steps in (MILLION, 1000 * MILLION):
        assert _mean_sparsity(MixedSparsity(steps, 0.8)) == pytest.approx(0.8 * (0.8 + 0.1 * 0.75), rel=1e-4)
