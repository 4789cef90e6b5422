"""DeepSpeed's engine on two processes: one process's masks, values and checkpoints, with masters cut anywhere."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import deepspeed_cases as cases
import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_on_all_ranks, results_of
from torch import Tensor

from mst_compile import sparsifier
from mst_compile.errors import RankMismatchError
from tests.oracles import assert_same_bits, assert_same_course

deepspeed = pytest.importorskip("deepspeed")
BY_GRADIENT = cases.SCHEDULES["by gradient"]


def begin() -> None:
    rank = str(dist.get_rank())
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29733",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": rank,
        "RANK": rank,
    }
    deepspeed.init_distributed(dist_backend="gloo")


def made(case: cases.Case, name: str = "by gradient") -> Any:
    return cases.engine_of(case, *cases.fresh(cases.SCHEDULES[name], case.decay), ranks=2)


def train(case: cases.Case, engine: Any, of: slice = slice(None)) -> Any:
    return cases.train(case, engine, of, dist.get_rank(), 2)


def masters(engine: Any) -> list[Tensor]:
    return [cases.master_of(engine, p).clone() for p in engine.module.parameters()]


def assert_as_by_hand(case: cases.Case, name: str) -> None:
    engine = made(case, name)
    expected, course = cases.by_hand(case, cases.SCHEDULES[name])
    for step, (got, want) in enumerate(zip(train(case, engine), course, strict=True)):
        assert all(torch.equal(got[n], want[n]) for n in want), step
        cases.assert_zero_outside(engine)
    assert sparsifier(engine.module).step_count == cases.STEPS
    for one, other in zip(masters(engine), expected.parameters(), strict=True):
        assert_same_course(one, other.detach(), parted=1000)


def stages() -> None:
    begin()
    for case in cases.WIDE:
        assert_as_by_hand(case, "by gradient")


def first_steps_of_regrown_blocks() -> None:
    for name in ("own steps", "warm-up", "restored"):
        assert_as_by_hand(cases.WIDE[1], name)


def narrow() -> None:
    """Halves of a batch are rounded apart, so it is not one process's course; but ranks are one model, of masters."""
    for case in cases.NARROW:
        engine = made(case)
        list(train(case, engine))
        cases.assert_zero_outside(engine)
        assert_same_on_all_ranks(*sparsifier(engine.module).masks.values(), *engine.module.parameters())
        assert sparsifier(engine.module).step_count == cases.STEPS
        for master, parameter in zip(masters(engine), engine.module.parameters(), strict=True):
            assert_same_bits(master.to(case.dtype), parameter.detach())


def checkpoints() -> None:
    folder: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    for case in (cases.WIDE[1], cases.NARROW[2]):
        whole = made(case)
        course = list(train(case, whole))
        first = made(case)
        list(train(case, first, slice(4)))
        first.save_checkpoint(folder[0])
        other = made(case)
        other.load_checkpoint(folder[0])
        assert sparsifier(other.module).step_count == 4
        for got, want in zip(train(case, other, slice(4, None)), course[4:], strict=True):
            assert all(torch.equal(got[n], want[n]) for n in want)
        for one, two in zip(masters(other), masters(whole), strict=True):
            assert_same_bits(one, two)


def other_seeds() -> None:
    """Gradients differ between ranks, and no optimizer of the weights ever sees them: who trains together is known."""
    case = cases.WIDE[0]
    torch.manual_seed(0)
    model = cases.Net()
    cases.sparsify(model, BY_GRADIENT, block=4, seed=dist.get_rank())
    optimizer = torch.optim.AdamW(cases.mst_compile.param_groups(model), lr=1e-3)
    engine = cases.engine_of(case, model, optimizer, ranks=2)
    with pytest.raises(RankMismatchError, match="seed"):
        list(train(case, engine, slice(1)))


SCENARIOS = [stages, first_steps_of_regrown_blocks, narrow, checkpoints, other_seeds]
two = results_of(SCENARIOS, 2)


@pytest.mark.parametrize("scenario", [scenario.__qualname__ for scenario in SCENARIOS])
def test_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]
