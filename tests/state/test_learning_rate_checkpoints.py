"""Laws of rate and decay in checkpoints: runs resume bit for bit with the laws that they had."""

from __future__ import annotations

import io
import pathlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dsd
from training import batches, fresh, restored, train

from mst_compile import param_groups
from mst_compile.errors import ArgumentError, MSTWarning

Groups = list[dict[str, Any]]
WEIGHT_DECAY = 0.3


def run(steps: int, **laws: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = fresh(restored())
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=WEIGHT_DECAY, **laws), 1e-2)
    train(model, optimizer, "none", batches(steps))
    return model, optimizer


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def rest_of(data: int, done: int) -> Any:
    return iter(list(batches(data))[done:])


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("at", [0, 1, 5, 9, 19])
@pytest.mark.parametrize(
    "laws",
    [
        {},
        {"density_decay": 0},
        {"density_rate": "graphcore"},
        {"density_rate": lambda d: 2 - d, "density_decay": lambda d: d},
    ],
    ids=["default", "old", "graphcore", "functions"],
)
def test_resumed_is_uninterrupted(laws: dict[str, Any], at: int) -> None:
    whole, _ = run(20, **laws)
    model, optimizer = run(at, **laws)
    state = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again, other = run(0, **laws)
    again.load_state_dict(state["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        other.load_state_dict(state["optimizer"])
    train(again, other, "none", rest_of(20, at))
    assert_same_weights(again, whole)


@pytest.mark.parametrize("by_hand", [False, True])
def test_laws_come_with_the_checkpoint_as_all_of_a_group_does(by_hand: bool) -> None:
    """What a group does not say is its default, and a checkpoint says it, so that it cannot be taken for an old one."""
    model, optimizer = run(3, density_rate="graphcore")
    if by_hand:
        for group in optimizer.param_groups:
            group.pop("density_decay", None)
    state = through_a_file(optimizer.state_dict())
    assert [g.get("density_decay") for g in state["param_groups"]][:-1] == ["independent"] * (len(groups_of(model)))
    assert ("density_decay" in optimizer.param_groups[0]) is not by_hand
    _, other = run(0, density_decay=0)
    other.load_state_dict(state)
    assert (other.param_groups[0]["density_rate"], other.param_groups[0]["density_decay"]) == (
        "graphcore",
        "independent",
    )


def groups_of(model: nn.Module) -> Groups:
    return [g for g in param_groups(model) if "density_rate" in g]


def as_before_there_was_a_law_of_the_decay(state: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in g.items() if k != "density_decay"} for g in state["param_groups"]]
    return {**state, "param_groups": groups}


def test_an_old_checkpoint_goes_on_as_it_began_and_says_so() -> None:
    """A run whose decay grew with the rate keeps doing so, bit for bit."""
    whole, _ = run(20, density_decay=0)
    model, optimizer = run(9, density_decay=0)
    state = as_before_there_was_a_law_of_the_decay(through_a_file(optimizer.state_dict()))
    again, other = run(0)
    again.load_state_dict(model.state_dict())
    with pytest.warns(MSTWarning, match="weight decay grew with the learning rate") as told:
        other.load_state_dict(state)
    assert len([w for w in told if issubclass(w.category, MSTWarning)]) == 1
    train(again, other, "none", rest_of(20, 9))
    assert_same_weights(again, whole)
    assert "density_decay" not in state["param_groups"][0]  # the caller's


def test_an_old_checkpoint_without_decay_has_nothing_to_say() -> None:
    model = fresh(restored())
    optimizer = torch.optim.AdamW(param_groups(model), 1e-2)
    train(model, optimizer, "none", batches(2))
    state = as_before_there_was_a_law_of_the_decay(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["density_decay"] == 0


def test_a_function_that_is_missing_is_told_before_anything_is_loaded() -> None:
    _, optimizer = run(3, density_rate=lambda d: 2.0)
    state = through_a_file(optimizer.state_dict())
    _, other = run(1)
    before = {k: v.clone() for k, v in next(iter(other.state.values())).items()}
    with pytest.raises(ArgumentError, match=r"density_rate.*it has 1\.0"):
        other.load_state_dict(state)
    assert other.param_groups[0]["density_rate"] == 1.0
    assert all(torch.equal(v, before[k]) for k, v in next(iter(other.state.values())).items())


@pytest.mark.parametrize(
    "laws", [{}, {"density_rate": "graphcore", "density_decay": lambda d: d}], ids=["default", "of one's own"]
)
def test_distributed_checkpoints_hold_the_laws(laws: dict[str, Any], tmp_path: pathlib.Path) -> None:
    whole, _ = run(20, **laws)
    model, optimizer = run(9, **laws)
    dcp.save({"model": model.state_dict(), "optimizer": dsd.get_optimizer_state_dict(model, optimizer)},
             checkpoint_id=tmp_path)  # fmt: skip
    again, other = run(0, **laws)
    template = {"model": again.state_dict(), "optimizer": dsd.get_optimizer_state_dict(again, other)}
    dcp.load(template, checkpoint_id=tmp_path)
    dsd.set_state_dict(again, other, model_state_dict=template["model"], optim_state_dict=template["optimizer"])
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
    train(again, other, "none", rest_of(20, 9))
    assert_same_weights(again, whole)
