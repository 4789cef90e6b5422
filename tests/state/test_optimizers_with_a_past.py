"""Optimizers that kept state before the model was sparse, and state in tensors of other kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from coded import Coded, CodedSGD
from helpers import Blocks, static
from mask_cases import element_masks
from situations import train
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
