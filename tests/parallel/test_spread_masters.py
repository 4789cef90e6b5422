"""Copies of weights of which each of two ranks trains its part, cut anywhere: one process's masks and values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_on_all_ranks, results_of
from torch import Tensor, nn
from zero_stand_in import DeepSpeedZeroOptimizer, installed

import mst_compile
from mst_compile import Constant, sparsifier, sparsify
from mst_compile.errors import RankMismatchError
from tests.oracles import assert_same_bits, assert_same_course

STEPS = 12
SCHEDULES = [
    Constant(0.5, interval=3, growth="gradient"),
    Constant(0.5, interval=3, growth="gradient", regrown="own steps"),
    Constant(0.5, interval=3, regrown_warmup=4, magnitude="l1"),
]


def fresh(schedule: Constant, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Rows of 37 elements, so that parts begin within rows and blocks; and a weight that one rank has nothing of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 61), nn.GELU(), nn.Linear(61, 37), nn.Linear(37, 8, bias=False))
    sparsify(model, schedule, block=4, seed=seed)
    return model, torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), lr=1e-3)


def batches() -> Tensor:
    return torch.randn(STEPS, 16, 37, generator=torch.Generator().manual_seed(0))


def backward(model: nn.Module, x: Tensor) -> None:
    (model(x) - x[:, :8]).square().mean().backward()


def own(x: Tensor) -> Tensor:
    return x.chunk(2)[dist.get_rank()]


def zero(schedule: Constant, seed: int = 0) -> tuple[nn.Module, DeepSpeedZeroOptimizer]:
    model, optimizer = fresh(schedule, seed)
    return model, DeepSpeedZeroOptimizer(optimizer)


def parts_are_trained_as_the_weights_would_be() -> None:
    with installed():
        for schedule in SCHEDULES:
            model, optimizer = zero(schedule)
            expected, plain = fresh(schedule)
            for step, x in enumerate(batches()):
                backward(model, own(x))
                optimizer.step()
                backward(expected, x)
                plain.step()
                plain.zero_grad()
                want = sparsifier(expected).masks
                assert all(torch.equal(mask, want[n]) for n, mask in sparsifier(model).masks.items()), step
                for weight, p in sparsifier(model).parameters():
                    assert not p[weight.outside(p.device)].any()
            assert_same_on_all_ranks(*model.parameters())
            assert sparsifier(model).step_count == STEPS
            for one, other in zip(model.parameters(), expected.parameters(), strict=True):
                assert_same_course(one.detach(), other.detach(), parted=1000)


def state_is_clean_on_every_rank() -> None:
    """Dropped blocks and grown ones, in moments that are cut in the middle of a row."""
    with installed():
        model, optimizer = zero(SCHEDULES[0])
        for x in batches()[:6]:
            backward(model, own(x))
            optimizer.step()
        grown = 0
        for i, flat in enumerate(optimizer.bit16_groups_flat):
            (part,) = optimizer.optimizer.param_groups[i]["params"]
            for key in (None, "exp_avg", "exp_avg_sq"):
                found = part.detach() if key is None else optimizer.optimizer.state[part][key]
                parts = [torch.empty_like(found) for _ in range(2)]
                dist.all_gather(parts, found.clone())
                whole = torch.cat(parts)
                for weight, p in sparsifier(model).parameters():
                    if p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
                        at = p.storage_offset()
                        mine = whole[at : at + p.numel()].view(p.shape)
                        none = weight.outside(p.device)
                        if weight.grown is not None:
                            none |= weight.grid.expand(weight.grown)
                            grown += 1
                        assert not mine[none].any()
                        assert mine.any()
        assert grown >= 6


def checkpoints() -> None:
    with installed():
        whole, optimizer = zero(SCHEDULES[0])
        states: list[Any] = []
        for step, x in enumerate(batches()):
            if step == 5:
                states = copy.deepcopy(
                    [whole.state_dict(), optimizer.single_partition_of_fp32_groups, optimizer.optimizer.state_dict()]
                )
            backward(whole, own(x))
            optimizer.step()
        other, second = zero(SCHEDULES[0])
        other.load_state_dict(states[0])
        second.optimizer.load_state_dict(states[2])
        with torch.no_grad():
            for part, saved in zip(second.single_partition_of_fp32_groups, states[1], strict=True):
                part.copy_(saved)
        assert sparsifier(other).step_count == 5
        for x in batches()[5:]:
            backward(other, own(x))
            second.step()
        assert all(torch.equal(a, sparsifier(whole).masks[n]) for n, a in sparsifier(other).masks.items())
        for one, two in zip(other.parameters(), whole.parameters(), strict=True):
            assert_same_bits(one.detach(), two.detach())


def ranks_that_differ_are_told() -> None:
    with installed():
        model, optimizer = zero(SCHEDULES[0], seed=dist.get_rank())
        backward(model, own(batches()[0]))
        with pytest.raises(RankMismatchError, match="seed"):
            optimizer.step()


SCENARIOS = [
    parts_are_trained_as_the_weights_would_be,
    state_is_clean_on_every_rank,
    checkpoints,
    ranks_that_differ_are_told,
]
two = results_of(SCENARIOS, 2)


@pytest.mark.parametrize("scenario", [scenario.__qualname__ for scenario in SCENARIOS])
def test_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]
