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
import torch
import torch.distributed as dist
from program_cases import Op
from ranks import results_of
from simulated_rules import Course

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

PROGRAMS = 6  # beside the examples

# What a draw may miss: values that are brought to each layout, just before and after events, and steps left out there.
_COURSE = Course("constant", 0.7, interval=2, growth="mixed", drop=0.4, regrown_warmup=3)
_OPS: tuple[Op, ...] = (
    ("step", 1, ""), ("bring", 1, 1.0), ("step", 2, ""), ("bring", 2, 0.2), ("scaled", True), ("scaled", False),
    ("move", "ddp active blocks", False), ("bring", 3, 0.5), ("step", 1, ""), ("step", 1, "norm"),
)  # fmt: skip
EXAMPLES = [
    rank_programs.RankProgram(
        n, _COURSE, at, dtype, False, 4, "coverage", "random", optimizer, False, False, experts, _OPS
    )
    for n, (at, dtype, optimizer, experts) in enumerate(
        [("fsdp", torch.float64, "adamw", True), ("tensor parallel", torch.float64, "adam amsgrad", False)], 10**6
    )
]


def random_runs() -> None:
    explores = os.environ.get("HYPOTHESIS_PROFILE") == "explore"
    begun = [int(time.time()) if explores else 0, tempfile.mkdtemp(prefix="mst-tests-")]
    dist.broadcast_object_list(begun)
    drawn = [rank_programs.draw(begun[0] + i) for i in range(PROGRAMS * (20 if explores else 1))]
    for program in [*EXAMPLES, *drawn]:
        rank_programs.check(program, Path(begun[1]))


two = results_of([random_runs], 2)


def test_two_ranks(two: dict[str, str]) -> None:
    assert not two["random_runs"], two["random_runs"]
