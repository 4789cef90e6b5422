"""Gradients that sparse products have computed hold zeros already: they are masked again only where somebody may have
changed that on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_cases import (
    Layers,
    X,
    Zeroed,
    assert_zero_outside,
    noise,
    noise_in_place,
    noise_without_a_trace,
    trained,
)
from helpers import compiled, static
from mask_cases import element_masks
from torch import Tensor, nn

from mst_compile import Constant, sparsify
from mst_compile.state import binding


@pytest.fixture
def zeroed(monkeypatch: pytest.MonkeyPatch) -> Zeroed:
    return Zeroed(monkeypatch)


@pytest.mark.parametrize("again", [False, True], ids=["plain", "activation checkpoint"])
def test_nothing_is_written_to_what_products_computed(again: bool, zeroed: Zeroed) -> None:
    model, run = trained(again=again)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        assert zeroed.by(lambda: run(X).backward()) == 0
        assert_zero_outside(model)
        assert zeroed.by(optimizer.step) == 0
        optimizer.zero_grad()


@pytest.mark.parametrize("hook", [noise, noise_in_place, noise_without_a_trace])
def test_a_hook_on_the_way(hook: Any, zeroed: Zeroed) -> None:
    model, run = trained()
    model.first.weight.register_hook(hook)
    assert zeroed.by(lambda: run(X).backward()) == 1
    assert_zero_outside(model)


def test_a_hook_behind(zeroed: Zeroed) -> None:
    """One that was there before the model was made sparse sees the gradient first."""
    torch.manual_seed(0)
    model = Layers()

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.add_(1.0)

    model.first.weight.register_post_accumulate_grad_hook(add)
    run = compiled(sparsify(model, static(0.6), block=8))
    assert zeroed.by(lambda: run(X).backward()) == 1
    assert_zero_outside(model)


@pytest.mark.parametrize("first", [True, False])
def test_another_term_outside_of_the_graph(first: bool, zeroed: Zeroed) -> None:
    """Autograd adds it up with the graph's, into the memory of one of them or into new memory."""
    model, run = trained()

    def backward() -> None:
        own = model.first.weight.sum()
        (own + run(X) if first else run(X) + own).backward()

    assert zeroed.by(backward) == 1
    assert_zero_outside(model)


@pytest.mark.parametrize(
    "more", [torch.sum, lambda w: (X @ (w + 1.0)).sum(), lambda w: nn.functional.linear(w, w).sum()]
)
def test_another_use_in_the_graph(more: Callable[[Tensor], Tensor], zeroed: Zeroed) -> None:
    model, run = trained(more)
    assert zeroed.by(lambda: run(X).backward()) == 1
    assert_zero_outside(model)


def test_dense_products(zeroed: Zeroed) -> None:
    model, _ = trained()
    run = torch.compile(model, backend="mst", options={"mst.inner": "aot_eager", "mst.dense_threshold": 0.0})
    assert zeroed.by(lambda: run(X).backward()) == 2
    assert_zero_outside(model)


def test_gradients_on_all_blocks_are_not_taken_for_masked(zeroed: Zeroed) -> None:
    model, run = trained(schedule=Constant(0.6, growth="gradient", interval=2, drop_fraction=0.5))
    optimizer, dense = torch.optim.SGD(model.parameters(), 0.1), 0
    for _ in range(6):
        run(X).backward()
        state = binding.of(model.first.weight)
        assert state is not None
        assert state.computed is None
        outside = ~element_masks(model)["first.weight"]
        assert bool(model.first.weight.grad[outside].any()) is state.dense_grad  # type: ignore[index]
        dense += state.dense_grad
        optimizer.step()
        optimizer.zero_grad()
    assert dense == 3


def test_a_record_that_nobody_took_is_of_no_other_memory(zeroed: Zeroed) -> None:
    """``autograd.grad`` computes gradients that do not arrive."""
    model, run = trained()
    torch.autograd.grad(run(X), list(model.parameters()))
    loss = sum(p.sum() for p in model.parameters())
    assert zeroed.by(loss.backward) == 2  # type: ignore[union-attr]
    assert_zero_outside(model)


def test_a_mask_that_changed_on_the_way(zeroed: Zeroed) -> None:
    """As where a hook on another gradient of the same backward pass changes masks."""
    model, _ = trained()
    weight = binding.of(model.first.weight)
    assert weight is not None
    gradient = torch.where(weight.grid.expand(weight.mask), 1.0, 0.0)
    weight.note_computed(gradient)
    weight.set_mask(weight.mask.roll(1, 0))
    weight.take_computed(gradient)
    weight.mask_gradient(gradient)
    assert zeroed.count == 1
    assert not gradient[~weight.grid.expand(weight.mask)].any()


def test_another_part_of_the_same_memory(zeroed: Zeroed) -> None:
    """As where one buffer holds several gradients, and a hook hands over another one."""
    model, _ = trained()
    weight = binding.of(model.first.weight)
    assert weight is not None
    mask = weight.grid.expand(weight.mask)
    both = torch.stack([torch.where(mask, 1.0, 0.0), torch.ones(32, 32)])
    for part in (both[1], both[0].t()):
        weight.note_computed(both[0])
        weight.take_computed(part)
        weight.mask_gradient(part)
        assert not part[~mask].any()
    assert zeroed.count == 2
