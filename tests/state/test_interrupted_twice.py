"""Ctrl-C while what an earlier Ctrl-C has interrupted is being finished: the next step does what is left."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from interrupts import Interrupter, Ticking
from test_interrupts import _EVENT, Training

from mst_compile import sparsifier
from mst_compile.state import binding, steps
from mst_compile.state import weight as weights

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


def test_an_index_that_was_not_written_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by passes over weights and gradients nor by products."""
    training = Training("random")
    weight = next(w for w in map(binding.of, training.model.parameters()) if w is not None and w.index is not None)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_index", interrupt)
        with pytest.raises(KeyboardInterrupt):
            weight.set_mask(weight.mask.roll(1, 0))
    tensor = torch.ones(weight.grid.rows, weight.grid.cols)
    weight.zero_inactive_(tensor)
    assert torch.equal(tensor != 0, weight.grid.expand(weight.mask))
