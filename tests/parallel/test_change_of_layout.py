"""A run that is saved on tensor-parallel parts goes on anywhere, in the middle of its schedule: on other numbers of
ranks, on shards, on shards of parts and on one process, with the masks and losses of the run that was not interrupted.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracles import assert_same_course
from parallel_cases import ROUNDINGS, assert_same_run, tensor_parallel, train, whole
from ranks import SCHEDULES, mean_over_ranks, net, run
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from mst_compile import sparsifier, sparsify
from mst_compile.parallel.ranks import check_ranks

FOLDER = "MST_TEST_CHANGE_OF_LAYOUT"
SCHEDULE = SCHEDULES[1]  # in its warm-up, where it drops, and grows by gradients, at every second step
BEFORE, AFTER = range(7), range(7, 12)

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time


def resumes() -> None:
    """State dicts of model and optimizer continue a run bit for bit, into Parameters or in place of them."""
    model = sparsify(tensor_parallel(net()), SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, BEFORE)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, AFTER)
    for assign in (False, True):
        again = tensor_parallel(sparsify(net(), SCHEDULE, seed=9))
        again.load_state_dict(copy.deepcopy(saved[0]), assign=assign)
        other = torch.optim.AdamW(again.parameters(), 0.01)
        other.load_state_dict(copy.deepcopy(saved[1]))
        train(again, other, AFTER)
        assert_same_run(again, model, 0)


def saves() -> None:
    """A distributed checkpoint of tensor-parallel parts, and what the run comes to."""
    folder = _folder(dist.get_world_size())
    model = sparsify(tensor_parallel(net()), SCHEDULE)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, BEFORE)
    parts = dict(zip(("model", "optimizer"), dsd.get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=folder / "dcp")
    now = sparsifier(model).masks
    losses = [float(loss) for loss in train(model, optimizer, AFTER)]
    then = sparsifier(model).masks
    assert any(not torch.equal(mask, then[name]) for name, mask in now.items())
    expected = {"now": now, "then": then, "losses": losses, "weights": [whole(p) for p in model.parameters()]}
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


def resumes_on_two() -> None:
    _goes_on(_folder(2), None, shards=True)


def resumes_on_four() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _goes_on(_folder(2))
    _goes_on(_folder(2), mesh, shards=True)
    _goes_on(_folder(2), None, shards=True)


def resumes_on_one() -> None:
    _goes_on(_folder(2))
    _goes_on(_folder(4))


def _folder(ranks: int) -> Path:
    """Of the checkpoint that so many ranks have written."""
    return Path(os.environ[FOLDER], str(ranks))


def _goes_on(folder: Path, mesh: DeviceMesh | None = None, *, shards: bool = False) -> None:
    """On parts for all ranks; on shards with ``shards``, of parts with ``mesh``."""
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = _laid_out(mesh, shards)
    sparsify(model, SCHEDULE, seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    parts = dict(zip(("model", "optimizer"), dsd.get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=folder / "dcp")
    dsd.set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    own = sparsifier(model)
    assert (own.step_count, own.seed) == (len(BEFORE), 0)
    assert all(torch.equal(mask, expected["now"][name]) for name, mask in own.masks.items())
    data = mesh
    if shards and mesh is None:
        data = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    losses = [mean_over_ranks(loss) for loss in train(model, optimizer, AFTER, data)]
    assert losses == pytest.approx(expected["losses"], rel=1e-6)
    check_ranks(model)
    assert all(torch.equal(mask, expected["then"][name]) for name, mask in own.masks.items())
    for p, q in zip(model.parameters(), expected["weights"], strict=True):
        assert_same_course(whole(p), q, ROUNDINGS)


def _laid_out(mesh: DeviceMesh | None, shards: bool) -> nn.Module:
    model = net()
    if mesh is not None:
        tensor_parallel(model, mesh["tp"])
    elif not shards and dist.get_world_size() > 1:
        tensor_parallel(model)
    if shards:
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=None if mesh is None else mesh["dp"])
    return model


TWO = [resumes, saves, resumes_on_two]
FOUR = [saves, resumes_on_four]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where the ranks keep their checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("checkpoints")))
        yield


@pytest.fixture(scope="module")
def two(folder: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(two: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(FOUR, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("scenario", [s.__name__ for s in TWO])
def test_on_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]


@pytest.mark.parametrize("scenario", [s.__name__ for s in FOUR])
def test_on_four_ranks(four: dict[str, str], scenario: str) -> None:
    assert not four[scenario], four[scenario]


def test_on_one_process(four: dict[str, str], tmp_path: Path) -> None:
    assert not run([resumes_on_one], 1, tmp_path)["resumes_on_one"]
