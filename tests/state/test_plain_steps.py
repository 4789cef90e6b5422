"""What a step without an event asks of every weight: what is known already is not asked again, and where something has
changed it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_cases import Layers, X, assert_zero_outside, trained
from helpers import compiled
from mask_cases import element_masks
from oracles import assert_reordered
from torch import Tensor, nn

from mst_compile import Constant, densify, sparsifier
from mst_compile.graph import dispatch
from mst_compile.state import binding, event, weights
from mst_compile.state.weight import SparseWeight


class Calls:
    """Counts calls of a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.count = 0
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def by(self, function: Callable[[], object]) -> int:
        before = self.count
        function()
        return self.count - before


def state(parameter: Tensor) -> SparseWeight:
    weight = binding.of(parameter)
    assert weight is not None
    return weight


def test_what_is_known_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = trained()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        call(X).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    counts = {
        "bound": Calls(monkeypatch, weights, "bind"),
        "nodes looked through": Calls(monkeypatch, dispatch, "_parameter_of"),
        "gradients written": Calls(monkeypatch, SparseWeight, "mask_gradient"),
        "optimizers looked through": Calls(monkeypatch, sparsifier(model)._run, "of"),
    }
    for _ in range(3):
        step()
    found = {what: calls.count for what, calls in counts.items()}
    assert found == {
        "bound": 0,
        "nodes looked through": 0,
        "gradients written": 0,
        "optimizers looked through": 3,
    }


def test_an_event_writes_zeros_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into all that it leaves of weights, gradients and moments."""
    model, call = trained(schedule=Constant(0.6, growth="gradient", interval=2, drop_fraction=0.5))
    optimizer = torch.optim.AdamW(model.parameters())
    written: list[int] = []
    original = event.zero_all_inactive_

    def zero(whole: Any) -> None:
        written.append(len(whole))
        original(whole)

    monkeypatch.setattr(event, "zero_all_inactive_", zero)
    for _ in range(4):
        call(X).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert written == [8, 8]  # two weights: values, gradient and two moments
    outside = ~element_masks(model)["first.weight"]
    for tensor in (model.first.weight, *optimizer.state[model.first.weight].values()):
        assert tensor.dim() == 0 or not tensor[outside].any()


def _move(model: Layers) -> None:
    model.to("meta")


def _replace(model: Layers) -> None:
    new = nn.Parameter(model.first.weight.detach().clone())
    new._mst_weight = model.first.weight._mst_weight  # type: ignore[attr-defined]
    model.first.weight = new


def _take_the_hook(model: Layers) -> None:
    binding._remove_hook(model.first.weight)


def _take_the_state(model: Layers) -> None:
    binding.unbind(model.first.weight)


def _flatten(model: Layers) -> None:
    model.first.weight.data = model.first.weight.data.flatten()


@pytest.mark.parametrize("change", [_move, _replace, _take_the_hook, _take_the_state])
def test_what_has_changed_is_looked_at(change: Callable[[Layers], None]) -> None:
    model, _ = trained()
    own = sparsifier(model)._run.weights
    weight = state(model.first.weight)
    change(model)
    own.rebind()
    parameter = model.first.weight
    assert binding.of(parameter) is weight
    assert parameter in binding._hooks
    assert weight.index is not None
    assert weight.index.device == parameter.device


def test_a_weight_that_is_flat_is_refused() -> None:
    model, _ = trained()
    _flatten(model)
    with pytest.raises(Exception, match=r"of shape \(1024,\) now"):
        sparsifier(model)._run.weights.rebind()


def test_an_index_that_stays_behind_is_looked_at() -> None:
    """A Parameter that moves to another device may stay the same object."""
    model, _ = trained()
    weight = state(model.first.weight)
    assert weight.index is not None
    weight.index = weight.index.to("meta")
    assert not binding.is_at_home(weight, model.first.weight)


def test_a_copy_and_a_dense_model_are_not_at_home() -> None:
    model, _ = trained()
    weight = state(model.first.weight)
    assert binding.is_at_home(weight, model.first.weight)
    other = copy.deepcopy(model)
    assert not binding.is_at_home(weight, other.first.weight)
    assert binding.is_at_home(state(other.first.weight), other.first.weight)
    linear = copy.deepcopy(model.first)  # out of its model: dense
    assert binding.of(linear.weight) is None
    parameter = model.first.weight
    densify(model)
    assert not binding.is_at_home(weight, parameter)
    assert weight.home is None


def test_layers_that_share_a_graph_are_told_apart() -> None:
    """Each call's gradients are those of the layers that came in, as in eager mode."""
    torch.manual_seed(0)
    first, _ = trained()
    second = copy.deepcopy(first)
    sparsifier(second).apply_mask("first.weight", sparsifier(second).masks["first.weight"].roll(1, 0))
    torch._dynamo.reset()
    forward = compiled(lambda model, x: model(x))
    for _ in range(2):
        for model in (first, second):
            found = []
            for run_it in (forward, lambda model, x: model(x)):
                run_it(model, X).backward()
                found.append(model.first.weight.grad)
                model.zero_grad()
            assert_reordered(*found, terms=32)
            assert not found[0][~element_masks(model)["first.weight"]].any()


def test_two_passes_forward_before_the_first_backward() -> None:
    """Gradients are there when the second arrives, and were not when it was computed forward."""
    model, call = trained()
    call(X).backward()
    model.zero_grad()
    one, two = call(X), call(X + 1.0)
    one.backward()
    state_of = state(model.first.weight)
    held = model.first.weight.grad
    assert held is not None
    before = held._version
    two.backward()
    assert held._version == before + 1  # added to, and not written to again
    assert state_of.is_masked(held)
    assert_zero_outside(model)
