"""Random models, schedules and layouts on two ranks, checkpoints from one layout to another included: a run is its
simulation in one process, after every operation. ``HYPOTHESIS_PROFILE=explore`` draws twenty times as many, and
others each time."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
import rank_programs
import torch.distributed as dist
from ranks import results_of

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

PROGRAMS = 6  # beside the examples


def random_runs() -> None:
    explores = os.environ.get("HYPOTHESIS_PROFILE") == "explore"
    begun = [int(time.time()) if explores else 0, tempfile.mkdtemp(prefix="mst-tests-")]
    dist.broadcast_object_list(begun)
    drawn = [rank_programs.draw(begun[0] + i) for i in range(PROGRAMS * (20 if explores else 1))]
    for program in [*rank_programs.EXAMPLES, *drawn]:
        rank_programs.check(program, Path(begun[1]))


two = results_of([random_runs], 2)


def test_two_ranks(two: dict[str, str]) -> None:
    assert not two["random_runs"], two["random_runs"]
