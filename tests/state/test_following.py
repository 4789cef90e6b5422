"""Masks that follow values which a checkpoint brings alone, in the middle of a run: nothing of what is no longer active
stays, whoever steps and whenever the next topology event is."""

from __future__ import annotations

import pytest
import torch
from helpers import Blocks
from mask_cases import element_masks
from torch import nn, optim
from training import batches, loss_of

from mst_compile import Constant, sparsifier, sparsify

pytestmark = pytest.mark.filterwarnings("ignore:values stood outside:mst_compile.MSTWarning")


def bring(model: nn.Module, seed: int) -> None:
    """Load values without zeros, of another run."""
    torch.manual_seed(seed)
    model.load_state_dict({n: torch.randn_like(v) / 8 for n, v in model.state_dict().items()})


def step(model: nn.Module, optimizers: list[optim.Optimizer], x: torch.Tensor) -> None:
    loss_of(model, x).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def assert_nothing_outside(model: nn.Module, optimizers: list[optim.Optimizer]) -> None:
    for name, mask in element_masks(model).items():
        p = model.get_parameter(name)
        state = [t for o in optimizers for t in o.state.get(p, {}).values() if t.shape == p.shape]
        assert len(state) == 2
        for tensor in (p.detach(), *state):
            assert not tensor[~mask].any(), name


def test_an_event_at_the_step_that_masks_follow_in() -> None:
    """Each of two optimizers settles its own weights; then blocks of both are dropped."""
    model = sparsify(Blocks(), Constant(0.7, interval=3, growth="random", drop_fraction=0.5), block=4)
    optimizers: list[optim.Optimizer] = [optim.Adam(layer.parameters(), 1e-2) for layer in model.layers]
    for i, x in enumerate(batches(6)):
        if i == 5:
            bring(model, 1)
        before = sparsifier(model).masks
        step(model, optimizers, x)
        assert_nothing_outside(model, optimizers)
    assert any(not torch.equal(mask, before[name]) for name, mask in sparsifier(model).masks.items())


@pytest.mark.parametrize("regrown", ["first estimate", "own steps"])
def test_what_has_just_grown_and_does_not_follow(regrown: str) -> None:
    """The second moment of no block begins that is not active; and if one grows later, its steps are counted anew."""
    schedule = Constant(0.7, interval=2, growth="random", drop_fraction=0.5, regrown=regrown)  # type: ignore[arg-type]
    model = sparsify(Blocks(), schedule, block=1)
    optimizer = optim.Adam(model.parameters(), 1e-2)
    for x in batches(4):
        step(model, [optimizer], x)
    weights = sparsifier(model).weights.values()
    grown = {weight.name: weight.grown for weight in weights}
    bring(model, 2)
    step(model, [optimizer], next(batches(1)))
    lost = 0
    for weight in weights:
        assert grown[weight.name] is not None
        lost += int((grown[weight.name] & ~weight.mask).sum())
        assert weight.young is None or bool(weight.mask.flatten()[weight.young.blocks].all())
    assert lost > 0
    assert_nothing_outside(model, [optimizer])
