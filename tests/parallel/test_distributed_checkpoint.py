"""Optimizers that are spread over ranks, and runs that resume on another number of ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracles import assert_same_course
from ranks import assert_same_on_all_ranks, batches, mine, net
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.parallel.ranks import check_ranks

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

SCHEDULE = Constant(0.7, interval=3)
FOLDER = "MST_TEST_CHECKPOINT"
BEFORE, AFTER = 10, 25  # the first run saves at BEFORE and goes on to AFTER


def zero_redundancy() -> None:
    """Every rank steps its part of the weights inside the outer step, then all get all: one step, after all of it."""
    models, optimizers = [], []
    for zero in (False, True):
        model = sparsify(net(), SCHEDULE)
        ddp = DistributedDataParallel(model)
        optimizer = (
            ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, lr=1e-2)
            if zero
            else torch.optim.AdamW(ddp.parameters(), 1e-2)
        )
        for step, (x, y) in enumerate(batches(20), 1):
            optimizer.zero_grad()
            (ddp(mine(x)) - mine(y)).square().mean().backward()
            optimizer.step()
            assert sparsifier(model).step_count == step
        models.append(model)
        optimizers.append(optimizer)
    check_ranks(models[1])
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
        assert_same_on_all_ranks(q.detach())
    for weight, parameter in sparsifier(models[1]).parameters():
        outside = ~weight.grid.expand(weight.mask)
        for state in (optimizers[1].optim.state.get(parameter, {}),):
            assert not any(v[outside].any() for v in state.values() if v.shape == parameter.shape)


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sparsify(net(), SCHEDULE, seed=dist.get_world_size())  # the checkpoint's seed counts
    for block in (model.first, model.second):
        fully_shard(block)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step, (x, y) in enumerate(batches(stop)):
        if step >= start:
            optimizer.zero_grad()
            (model(mine(x)) - mine(y)).square().mean().backward()
            optimizer.step()
    optimizer.zero_grad()


def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    model_state, optimizer_state = dsd.get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.full_tensor().detach() for n, p in model.named_parameters()}  # type: ignore[operator]


def saves() -> None:
    """Two ranks train, save, and go on; what they hold at either moment is written down."""
    folder = Path(os.environ[FOLDER])
    model, optimizer = sharded()
    train(model, optimizer, 0, BEFORE)
    dcp.save(parts(model, optimizer), checkpoint_id=folder / "dcp")
    now = {"masks": sparsifier(model).masks, "weights": whole(model)}
    train(model, optimizer, BEFORE, AFTER)
    then = {"masks": sparsifier(model).masks, "weights": whole(model)}
    if dist.get_rank() == 0:
        torch.save({"now": now, "then": then}, folder / "expected.pt")


def resumes_elsewhere() -> None:
    """Any number of ranks goes on from there with the same masks, now and through later events."""
    folder = Path(os.environ[FOLDER])
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model, optimizer = sharded()
    state = parts(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "dcp")
    dsd.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])  # type: ignore[arg-type]
    own = sparsifier(model)
    assert own.step_count == BEFORE
    assert own.seed == 2
    assert all(torch.equal(mask, expected["now"]["masks"][n]) for n, mask in own.masks.items())
    assert all(torch.equal(p, expected["now"]["weights"][n]) for n, p in whole(model).items())
    train(model, optimizer, BEFORE, AFTER)
    check_ranks(model)
    assert all(torch.equal(mask, expected["then"]["masks"][n]) for n, mask in own.masks.items())
    for name, value in whole(model).items():
        assert_same_course(value, expected["then"]["weights"][name], 10**4)


def test_zero_redundancy_optimizer_counts_one_step(tmp_path: Path) -> None:
    assert ranks.run([zero_redundancy], 2, tmp_path)["zero_redundancy"] == ""


def test_another_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    for number, scenario in ((2, saves), (1, resumes_elsewhere), (4, resumes_elsewhere)):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        assert ranks.run([scenario], number, folder)[scenario.__name__] == ""
