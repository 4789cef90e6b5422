"""Products that are written as few people write them: broadcast operands, parts that get no gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import check_model, compiled, loss_and_grads, static, statuses
from oracles import assert_reordered
from torch import Tensor, nn

import mst_compile

TOKENS, WIDTH, OUT = 6, 32, 48


class Layer(nn.Module):
    """A weight ``[out, in]``, a bias of any shape, and a rule."""

    def __init__(self, rule: Callable[[Tensor, Tensor, Tensor], Tensor], bias: tuple[int, ...] = (OUT,)) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(OUT, WIDTH) / WIDTH**0.5), nn.Parameter(torch.randn(bias))
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, self.w, self.b)


# -- biases of all shapes that are broadcast to the result's -----------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [(), (1,), (OUT,), (1, 1), (1, OUT), (TOKENS, 1), (TOKENS, OUT)])
@pytest.mark.parametrize("form", ["linear", "addmm"])
def test_a_bias_is_broadcast(form: str, bias: tuple[int, ...], autocast: bool) -> None:
    rule = F.linear if form == "linear" else lambda x, w, b: torch.addmm(b, x, w.t())
    model = check_model(
        lambda: Layer(rule, bias),
        torch.randn(TOKENS, WIDTH),
        include="w",
        block=8,
        precision=torch.bfloat16 if autocast else torch.float32,
        context=lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    )
    assert statuses(model)["w"].startswith("matched (1 use)")


@pytest.mark.parametrize("rule", ["bk,nk->bn", "...k,nk->...n"])
def test_a_feature_that_einsum_broadcasts(rule: str) -> None:
    model = check_model(
        lambda: Layer(lambda x, w, b: torch.einsum(rule, x, w)), torch.randn(TOKENS, 1), include="w", block=8
    )
    assert "broadcast" in statuses(model)["w"]


def test_nested_tensors_stay_dense() -> None:
    model = mst_compile.sparsify(Layer(F.linear), static(), include="w", block=8)
    parts = [torch.randn(length, WIDTH) for length in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for got, x in zip(compiled(model)(nested).unbind(), parts, strict=True):
        assert_reordered(got.detach(), model(x).detach(), 2 * WIDTH)
    assert "nested tensor" in statuses(model)["w"]


# -- gradients that do not come --------------------------------------------------------------------------------------


def unrecorded(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


# What is done with the weight, and whether the product becomes sparse all the same.
UNRECORDED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], bool]] = {
    "copied": (lambda x, w, b: F.linear(x, unrecorded(w.clone), b), False),
    "transposed": (lambda x, w, b: x @ unrecorded(w.t) + b, False),
    "transposed, recorded again": (lambda x, w, b: F.linear(x, unrecorded(w.t).t(), b), False),
    "cast": (lambda x, w, b: F.linear(x, unrecorded(lambda: w.double().contiguous()).float(), b), False),
    "the product too": (lambda x, w, b: unrecorded(lambda: x @ w.t()) + b, True),
    "one of two products": (lambda x, w, b: F.linear(x, w, b) + unrecorded(lambda: F.linear(x, w)), True),
    "recorded within": (lambda x, w, b: unrecorded(lambda: recorded(lambda: F.linear(x, w.clone(), b))), True),
}


def recorded(function: Callable[[], Tensor]) -> Tensor:
    with torch.enable_grad():
        return function()


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("form", UNRECORDED)
def test_no_gradient_passes_what_was_not_recorded(form: str, needs_input: bool) -> None:
    rule, sparse = UNRECORDED[form]
    model = mst_compile.sparsify(Layer(rule), static(), include="w", block=8)
    x = torch.randn(TOKENS, WIDTH)
    args = (x,) if needs_input else ()
    runs = [run if needs_input else lambda run=run: run(x) for run in (model, compiled(model))]
    want, got = (loss_and_grads(model, run, args) for run in runs)
    assert got.keys() == want.keys()
    for name in want:
        assert_reordered(got[name], want[name], 2 * WIDTH)
    said = statuses(model)["w"]
    assert said.startswith("matched" if sparse else "not matched")
    assert sparse or "no gradient passes" in said


@torch.no_grad()
def test_without_gradients_nothing_stops_them() -> None:
    model = mst_compile.sparsify(Layer(lambda x, w, b: x @ w.t() + b), static(), include="w", block=8)
    x = torch.randn(TOKENS, WIDTH)
    assert_reordered(compiled(model)(x), model(x), 2 * WIDTH)
    assert statuses(model)["w"].startswith("matched (1 use)")
