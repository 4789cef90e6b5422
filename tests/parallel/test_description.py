"""What ranks compare: everything that they must have in common, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from torch import nn

from mst_compile import Constant, MixedSparsity, Schedule, sparsify
from mst_compile.parallel.description import describe, difference
from mst_compile.schedule import GradualPruning
from mst_compile.state.sparsifier import sparsifier


class Table(Schedule):
    """A schedule of the user's own, which ends, counts in numpy, and holds what belongs to a rank."""

    max_sparsity = 0.75

    def __init__(self, rank: int, *events: int) -> None:
        self.rank, self.logger = rank, object()
        self.events = np.zeros(20, dtype=bool)
        self.events[list(events)] = True

    def sparsity_at(self, step: int) -> Any:
        return np.float32(0.75)

    def is_topology_event(self, step: int) -> Any:
        return self.events[step]


def described(schedule: Schedule, **options: Any) -> dict[str, Any]:
    return describe(sparsifier(sparsify(nn.Linear(64, 64), schedule, **options))._run)


def test_equal_runs_are_described_equally() -> None:
    for make in (
        lambda: Constant(0.5),
        lambda: GradualPruning(1000, 0.5),
        lambda: MixedSparsity(1000, attention="sparse"),
        lambda: Table(3, 7),
    ):
        one = described(make())
        assert one == described(make()) == json.loads(json.dumps(one))
    assert described(Table(0, 7)) == described(Table(1, 7)), "what belongs to a rank is no difference"


@pytest.mark.parametrize(
    "name",
    [
        "total_steps",
        "interval",
        "drop_fraction",
        "growth",
        "settle",
        "distribution",
        "stride",
        "magnitude",
        "regrown",
        "regrown_warmup",
    ],
)
def test_every_argument_of_a_schedule_counts(name: str) -> None:
    other = {"total_steps": 2000, "interval": 50, "drop_fraction": 0.2, "growth": "random", "settle": 0.2}
    other |= {"distribution": "uniform", "stride": 64, "magnitude": "l1"}
    other |= {"regrown": "own steps", "regrown_warmup": 9}
    schedule = MixedSparsity(1000)
    one, two = described(schedule), described(dataclasses.replace(schedule, **{name: other[name]}))
    assert one != two
    assert name in difference(one, two)


def test_other_events_of_a_schedule_of_ones_own_count() -> None:
    assert "topology events" in difference(described(Table(0, 7)), described(Table(0, 8)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed 0 and 1"),
        ({"guard": "none"}, "guard of weight"),
        ({"block": 16}, r"block of weight \(8 and 16\)"),
    ],
)
def test_every_option_counts(options: dict[str, Any], message: str) -> None:
    assert re.search(message, difference(described(Constant(0.5)), described(Constant(0.5), **options)))
