"""Regrown weights start gently: their second moment begins at its first estimate, in whatever form it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mask_cases import element_masks
from test_other_optimizers import packaged
from torch import nn
from training import OPTIMIZERS, batches, fresh, train

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.state import second_moments, stepping

GENTLE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{n: OPTIMIZERS[n] for n in ("adamw", "adamw foreach", "adamw fused", "adamw amsgrad")},
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "adamw beta2=.95": lambda p: torch.optim.AdamW(p, 1e-2, betas=(0.9, 0.95)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, alpha=0.999),
}


def largest_updates(make: Callable[[Any], torch.optim.Optimizer], block: int) -> tuple[float, float]:
    """Largest update, in learning rates, of weights regrown after 300 steps within 40 more, and of the others.

    Gradients are noise of the same size everywhere, so no weight has reason to move more than another.
    """
    torch.manual_seed(0)
    model = sparsify(nn.Linear(64, 64, bias=False), Constant(0.5, interval=300, total_steps=500), block=block)
    own, optimizer, noise = sparsifier(model), make(model.parameters()), torch.Generator().manual_seed(0)
    old = element_masks(model)["weight"]
    grown = torch.zeros(64, 64, dtype=torch.bool)
    most = {"grown": 0.0, "others": 0.0}
    for step in range(1, 341):
        if step == 301:
            now = element_masks(model)["weight"]
            grown, old = now & ~old, now & old
            assert grown.any()
        model.weight.grad = torch.randn(64, 64, generator=noise) * (
            1.0 if own.weights["weight"].dense_grad else element_masks(model)["weight"]
        )
        before = model.weight.detach().clone()
        optimizer.step()
        if step > 300:
            change = (model.weight.detach() - before).abs() / 1e-2
            most["grown"] = max(most["grown"], change[grown].max().item())
            most["others"] = max(most["others"], change[old & ~grown].max().item())
    return most["grown"], most["others"]


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("name", GENTLE)
def test_first_updates_of_regrown_weights_are_not_too_large(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown, others = largest_updates(GENTLE[name], block)
    assert grown <= 1.5 * others, "regrown weights move like the ones around them"
    assert grown >= (0.3 if name == "rmsprop" else 0.7) * others, "and no less"
    if name in ("adamw", "rmsprop"):
        monkeypatch.setattr(stepping, "start_second_moments", lambda *_: None)
        careless, _ = largest_updates(GENTLE[name], block)
        assert careless > 2.5 * others, "and would not if their second moment began at 0"


def test_moments_of_active_weights_are_left_alone() -> None:
    """Only what has just grown gets a second moment of its own."""
    results = []
    for careful in (True, False):
        model = fresh(Constant(0.6, interval=4))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        data = list(batches(5))
        train(model, optimizer, "none", iter(data[:3]))
        before = element_masks(model)
        train(model, optimizer, "none", iter(data[3:4]))
        grown = {n: mask & ~before[n] for n, mask in element_masks(model).items()}
        if not careful:
            for weight in sparsifier(model).weights.values():
                weight.grown = None
        train(model, optimizer, "none", iter(data[4:]))
        state = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters() if n in grown}
        results.append((grown, state))
    (grown, careful_state), (_, other_state) = results
    for name, mask in grown.items():
        assert mask.any()
        assert torch.equal(careful_state[name][~mask], other_state[name][~mask])
        assert (careful_state[name][mask] > other_state[name][mask]).all()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "torchao"])
def test_regrown_weights_start_gently_where_state_is_coded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In codes of 8 bits too, whose scale a group of elements shares."""
    options = {"lr": 1e-2, "weight_decay": 0.0}
    if name == "torchao":
        make = packaged("torchao.optim", "AdamW8bit", block_size=64, **options)
    else:
        make = packaged("bitsandbytes.optim", name, min_8bit_size=16, **options)
    grown, others = largest_updates(make, 8)
    assert 0.7 * others <= grown <= 1.5 * others
    monkeypatch.setattr(stepping, "start_second_moments", lambda *_: None)
    careless, _ = largest_updates(make, 8)
    assert careless > 2.5 * others


@pytest.mark.parametrize("elements", [256, 1000, 4096])
def test_codes_are_written_where_they_are_wanted_and_nowhere_else(elements: int) -> None:
    """Values under a mask are said to a code's width; other groups keep codes and scales, others of a group theirs."""
    generator = torch.Generator().manual_seed(0)
    book = torch.cat([torch.zeros(1), torch.logspace(-6, 0, 255)])
    groups = -(-elements // 256)
    scales = torch.rand(groups, generator=generator) + 0.5
    codes = torch.randint(1, 256, (elements,), generator=generator).to(torch.uint8)
    state = {"state2": codes.clone(), "qmap2": book, "absmax2": scales.clone()}
    mask = torch.zeros(elements, dtype=torch.bool)
    mask[3:30] = True
    for largest in (0.01, 3.0):  # below the scale of the group, and above
        values = torch.rand(elements, generator=generator) * largest
        second_moments._write_codes(state, "state2", mask, values)
        now = book[state["state2"].long()] * state["absmax2"][torch.arange(elements) // 256]
        half = (float(book[2] / book[1]) - 1) / 2  # of the way from a code to the next, relatively
        least = float(book[1] * state["absmax2"].max())
        assert ((now - values)[mask].abs() <= half * values[mask] + least).all()
        assert torch.equal(state["state2"][256:], codes[256:])
        assert torch.equal(state["absmax2"][1:], scales[1:])
        if largest < 0.5:
            assert torch.equal(state["state2"][~mask], codes[~mask])
            assert torch.equal(state["absmax2"], scales)
        before = book[codes.long()] * scales[torch.arange(elements) // 256]
        assert ((now - before)[~mask].abs() <= half * before[~mask] + least).all()
