"""Ctrl-C while what an earlier Ctrl-C has interrupted is being finished: the next step does what is left."""

from __future__ import annotations

import contextlib
import random

import pytest
from interrupts import Interrupter, Ticking
from test_interrupts import _EVENT, Training

from mst_compile import sparsifier
from mst_compile.state import steps

_PAIRS = 40


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_interrupts_behind_one_another_leave_nothing_half_done(growth: str) -> None:
    ticking = Ticking("state", "blocks", "rules", "parallel")

    def interrupted(at: set[int]) -> tuple[Training, Interrupter]:
        training, interrupter = Training(growth), Interrupter(at)
        with ticking.on(interrupter), contextlib.suppress(KeyboardInterrupt):
            training.step()
        return training, interrupter

    draw = random.Random(0)
    total = interrupted(set())[1].count
    assert total > 1000
    twice = 0
    for _ in range(_PAIRS):
        first = draw.randint(1, total)
        second = first + draw.choice([1, 2, 3, 5, 8, 13, 20, 35, 60])
        training, interrupter = interrupted({first, second, second + draw.choice([1, 3, 8])})
        twice += interrupter.raised > 1
        taken = sparsifier(training.model).step_count
        assert taken in (_EVENT - 1, _EVENT), first
        training.optimizer.zero_grad()
        training.step()
        training.check()
        assert sparsifier(training.model).step_count in (taken + 1, _EVENT + 1), first
        for _ in range(_EVENT):
            training.step()
        training.check()
        assert not sparsifier(training.model)._run.overdue
        assert not steps._running.steps
    assert twice > _PAIRS // 2
