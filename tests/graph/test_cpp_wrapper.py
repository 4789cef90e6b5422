"""Inductor's ``cpp_wrapper``, whose generated code is C++ that knows nothing of our functions in Python."""

from __future__ import annotations

import pytest
import torch
from helpers import static
from oracles import assert_all_as_good_as, assert_same_bits
from torch import nn
from torch._inductor import config as inductor_config

from mst_compile import Constant, export, sparsifier, sparsify


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


class _Both(nn.Module):
    """Attention in a pattern, and a stack of experts' matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.up = nn.Parameter(torch.randn(2, 64, 48) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.bmm(y.transpose(1, 2).reshape(2, -1, 64), self.up)


def test_attention_and_experts_are_trained_as_by_the_other_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels, so to the bit: attention in a pattern is not what eager mode computes."""
    monkeypatch.setenv("MST_COMPILE_DENSE_THRESHOLD", "1.0")
    model, x = _Both(), torch.randn(2, 96, 64)
    schedule = Constant(0.8, growth="none", attention="local", span=32)
    sparsify(model, schedule, block=8, include=["qkv.weight", "up"])
    found = []
    for wrapper in (True, False):
        torch._dynamo.reset()
        model.zero_grad()
        with inductor_config.patch(cpp_wrapper=wrapper):
            y = torch.compile(model, backend="mst")(x)
            y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    uses = [weight.uses for weight in sparsifier(model).weights.values()]
    assert all(use.seen and not use.dense_now for use in uses)
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)
