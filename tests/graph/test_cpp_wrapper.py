"""Inductor's ``cpp_wrapper``, whose generated code is C++ that knows nothing of our functions in Python."""

from __future__ import annotations

import pytest
import torch
from helpers import static
from oracles import assert_all_as_good_as
from torch import nn
from torch._inductor import config as inductor_config

from mst_compile import export, sparsifier, sparsify


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_are_called_through_their_operators(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_COMPILE_DENSE_THRESHOLD", "1.0")
    model = sparsify(nn.Linear(64, 48), static(0.8), block=8)
    x = torch.randn(32, 64)
    eager = {"output": model(x).detach()}
    truth = {"output": nn.functional.linear(x.double(), model.weight.double(), model.bias.double()).detach()}
    run = torch.compile(export.packed(model) if packed else model, backend="inductor" if packed else "mst")
    with inductor_config.patch(cpp_wrapper=True), torch.no_grad():
        fast = {"output": run(x)}
    assert_all_as_good_as(fast, eager, truth, torch.float32)


def test_gradients_are_computed_through_their_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weight too, which has two results and is called by another way."""
    monkeypatch.setenv("MST_COMPILE_DENSE_THRESHOLD", "1.0")
    model = sparsify(nn.Linear(64, 48), static(0.8), block=8)
    x, grad = torch.randn(32, 64), torch.randn(32, 48)

    def gradients(run: nn.Module) -> dict[str, torch.Tensor]:
        given = x.clone().requires_grad_()
        model.zero_grad()
        run(given).backward(grad)
        return {"input": given.grad} | {name: p.grad for name, p in model.named_parameters()}  # type: ignore[dict-item]

    eager = gradients(model)
    mask = sparsifier(model).weights["weight"].grid.expand(sparsifier(model).weights["weight"].mask)
    truth = {
        "input": grad.double() @ model.weight.detach().double(),
        "weight": (grad.double().t() @ x.double()) * mask,
        "bias": grad.double().sum(0),
    }
    with inductor_config.patch(cpp_wrapper=True):
        fast = gradients(torch.compile(model, backend="mst"))
    assert_all_as_good_as(fast, eager, truth, torch.float32)
