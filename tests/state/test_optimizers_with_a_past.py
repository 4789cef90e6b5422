"""Optimizers that kept state before the model was sparse, and state in tensors of other kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from coded import Coded, CodedSGD
from helpers import Blocks, static
from mask_cases import element_masks
from situations import train
from torch import Tensor
from training import assert_zero_outside

from mst_compile import Constant, densify, sparsifier, sparsify
from mst_compile.errors import OptimizerError


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, 1e-2),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    ],
)
def test_state_from_before_is_cleaned(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = Blocks()
    optimizer = make(model.parameters())
    for _ in range(2):
        train(model, optimizer, 3)
        sparsify(model, static())
        train(model, optimizer)
        assert_zero_outside(model, optimizer, gradients=False)
        densify(model)


class Filled(torch.optim.Optimizer):
    """Begins its state of an element at 1, whatever the gradient is."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                size = self.state[p].setdefault("size", torch.ones_like(p))
                p.sub_(size * p.grad, alpha=group["lr"])


@pytest.mark.parametrize("kept", [True, False], ids=["with state", "without"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon, Filled])
def test_state_of_parameters_that_join_is_cleaned(kind: Callable[..., torch.optim.Optimizer], kept: bool) -> None:
    """An optimizer takes Parameters over in mid-run, with what another has learnt of them before they were sparse."""
    model = Blocks()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    before = kind(matrices, 1e-2)
    train(model, before, 3)
    sparsify(model, static())
    optimizer = kind(matrices[:1], 1e-2)
    train(model, optimizer)
    optimizer.add_param_group({"params": matrices[1:]})
    for p in matrices[1:] if kept else []:
        optimizer.state[p] = before.state[p]
    train(model, optimizer)
    assert_zero_outside(model, optimizer, gradients=False)
    assert len(optimizer.state) == len(matrices) > 1


@pytest.mark.parametrize("way", ["made sparse", "loaded"])
def test_blocks_that_are_given_start_at_zero(way: str) -> None:
    """Of state from before a mask was given nothing moves what it lets grow."""
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    train(model, optimizer, 3)
    sparsify(model, static())
    if way == "loaded":
        train(model, optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
    before = element_masks(model)
    if way == "loaded":  # dropped, and let grow again
        kept = sparsifier(model).masks
        for name, mask in kept.items():
            sparsifier(model).apply_mask(name, ~mask)
        for name, mask in kept.items():
            sparsifier(model).apply_mask(name, mask)
        grown = before
    else:
        for name, mask in sparsifier(model).masks.items():
            sparsifier(model).apply_mask(name, torch.ones_like(mask))
        grown = {name: ~mask for name, mask in before.items()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, where in grown.items():
        weight = model.get_parameter(name)
        assert where.any(), name
        assert not weight[where].any(), name
        assert not optimizer.state[weight]["momentum_buffer"][where].any(), name


@pytest.mark.parametrize("exact", [True, False, None])
def test_state_in_a_tensor_subclass(exact: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleaned through its own copies, or refused at the first step."""
    monkeypatch.setattr(Coded, "exact", exact)
    model = sparsify(Blocks(), Constant(0.7, interval=2, growth="random"))
    optimizer = CodedSGD(model.parameters(), 0.01)
    if not exact:
        with pytest.raises(OptimizerError, match=r"CodedSGD keeps momentum of layers\.0\.1\.weight in a Coded"):
            train(model, optimizer)
        return
    train(model, optimizer, 7)
    for name, mask in element_masks(model).items():
        p = model.get_parameter(name)
        assert not p.detach()[~mask].any()
        assert not optimizer.state[p]["momentum"].codes[~mask].any()
