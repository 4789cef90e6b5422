"""What nobody would give to a forecast or a recommendation, and what is said of it; nothing changes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Blocks, unchanged
from torch import Tensor, nn
from training import batches, fresh

import mst_compile
from mst_compile import Constant, MixedSparsity, sparsify
from mst_compile.cost.inputs import MOST_STEPS
from mst_compile.errors import ForecastError, MSTError, SelectionError, WeightError

STATIC = Constant(0.5, growth="none")
SIZES: dict[str, Any] = {"tokens": 800, "tokens_per_step": 8}
LONG = {"tokens": 1_000_000}  # of shorter runs there is no recommendation
ASK: dict[str, Callable[..., Any]] = {
    "forecast": lambda model, **given: mst_compile.forecast(model, STATIC, **SIZES | given),
    "hardware": lambda model, **given: mst_compile.forecast(model, STATIC, hardware="H100", **SIZES | given),
    "recommend": lambda model, **given: mst_compile.recommend(model, **SIZES | LONG | given),
}
asked = pytest.mark.parametrize("ask", ASK.values(), ids=ASK)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Blocks()


MODELS: dict[str, tuple[Callable[[], nn.Module], type[MSTError], str]] = {
    "no linear layers": (lambda: nn.Conv2d(3, 3, 3), SelectionError, "no weight that can be made sparse"),
    "no parameters": (nn.Identity, SelectionError, "no weight that can be made sparse"),
    "narrow": (lambda: nn.Linear(64, 1), SelectionError, "narrower than a block"),
    "frozen": (lambda: nn.Linear(64, 64).requires_grad_(False), SelectionError, "frozen"),
    "meta": (on_meta, WeightError, "on the meta device"),
}


@asked
@pytest.mark.parametrize(("make", "error", "said"), MODELS.values(), ids=MODELS)
def test_models_that_cannot_be_sparse(
    make: Callable[[], nn.Module], error: type[MSTError], said: str, ask: Callable[..., Any]
) -> None:
    model = make()
    with unchanged(model), pytest.raises(error, match=said):
        ask(model)


@asked
def test_weights_that_are_not_there_yet(ask: Callable[..., Any]) -> None:
    with pytest.raises(WeightError, match="not initialised yet"):
        ask(nn.LazyLinear(8))


@asked
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_count_alike(dtype: torch.dtype, ask: Callable[..., Any]) -> None:
    plain = Blocks(64, 2, 64)
    model = Blocks(64, 2, 64).to(dtype)
    with unchanged(model, plain):
        found, same = ask(model), ask(plain)
    assert getattr(found, "flops", None) == getattr(same, "flops", None)
    assert getattr(found, "options", None) is None or found.options[0].share == same.options[0].share


@asked
def test_a_compiled_model_is_the_model(ask: Callable[..., Any]) -> None:
    model = Blocks(64, 2, 64)
    found, same = ask(torch.compile(model, backend="mst")), ask(model)
    assert str(found) == str(same)


@pytest.mark.parametrize(
    ("ask", "option"), [*((ask, "spasity") for ask in ASK.values()), (ASK["recommend"], "schedule")]
)
def test_options_that_there_are_not(option: str, ask: Callable[..., Any]) -> None:
    with pytest.raises(ForecastError, match=rf"has no '{option}': .* options of sparsify, block, include"):
        ask(Blocks(), **{option: 0.5})


@asked
def test_less_than_a_step_is_one_and_more_than_any_run_none(ask: Callable[..., Any]) -> None:
    if ask is ASK["recommend"]:
        with pytest.raises(ForecastError, match="a run of 8 tokens is too short for a recommendation"):
            ask(Blocks(64, 2, 64), tokens=3)
    else:
        assert sum(phase.stop - phase.start for phase in ask(Blocks(64, 2, 64), tokens=3).phases) == 1
    with pytest.raises(ForecastError, match=r"are 1.00001e\+07 optimizer steps, more than 10000000; are these"):
        ask(Blocks(), tokens=8 * (MOST_STEPS + 100))


# -- losses and optimizers ---------------------------------------------------------------------------------------------


def backward_first(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    return loss


LOSSES: dict[str, tuple[Callable[[nn.Module, Tensor], Any], str]] = {
    "another model": (lambda model, x: lambda: Blocks()(x).square().mean(), "depends on no parameter of the model"),
    "arguments": (lambda model, x: lambda y: model(y).mean(), "and takes some: pass lambda"),
    "complex": (lambda model, x: lambda: model(x).mean() * 1j, "loss must return the loss, a tensor of one element"),
    "many": (lambda model, x: lambda: model(x), "loss must return the loss, a tensor of one element"),
    "without gradients": (lambda model, x: lambda: model(x).mean().detach(), "loss must return the loss"),
    "no function": (lambda model, x: model(x).mean(), "loss must be a function without arguments"),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("make", "said"), LOSSES.values(), ids=LOSSES)
def test_losses_that_are_none(make: Callable[[nn.Module, Tensor], Any], said: str, sparse: bool) -> None:
    model = fresh() if sparse else Blocks()
    loss = make(model, next(batches()))
    one: Callable[..., Any] = mst_compile.forecast if sparse else mst_compile.recommend
    with unchanged(model), pytest.raises(ForecastError, match=said):
        one(model, **SIZES | ({} if sparse else LONG), loss=loss)


def test_a_loss_that_has_gone_backward_is_told() -> None:
    model, x = fresh(), next(batches())
    with unchanged(model), pytest.raises(ForecastError, match="loss runs a backward pass itself"):
        mst_compile.forecast(model, **SIZES, loss=lambda: backward_first(model, x))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_of_before_are_not_added_to() -> None:
    """Neither where time is measured, nor where FLOPs are counted."""
    model, x = fresh(), next(batches())
    backward_first(model, x)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def loss() -> Tensor:
        backward_first(model, x)
        return model(x).square().mean()

    mst_compile.forecast(model, **SIZES, loss=loss)
    assert before
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)


def test_gradient_accumulation_within_loss_is_timed() -> None:
    """Backward passes of micro-batches before the last, which is returned."""
    model, x = fresh(), next(batches())

    def loss() -> Tensor:
        backward_first(model, x)
        return model(x).square().mean()

    assert (mst_compile.forecast(model, **SIZES, loss=loss).seconds or 0) > 0


class Picky(torch.optim.SGD):
    """It takes no gradient that is 0."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise LookupError("a gradient of zeros")


OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lbfgs": (torch.optim.LBFGS, "a step of LBFGS runs the model by itself, through the closure"),
    "sparse": (torch.optim.SparseAdam, "a step of SparseAdam cannot be timed"),
    "picky": (lambda p: Picky(p, 1e-2), r"gradients of zeros raises LookupError\('a gradient of zeros'\)"),
    "no optimizer": (list, "optimizer must be a torch.optim.Optimizer"),
}


@pytest.mark.parametrize(("make", "said"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_that_cannot_be_timed(make: Callable[[Any], Any], said: str) -> None:
    model, x = sparsify(Blocks(), MixedSparsity(100)), next(batches())
    optimizer = make(list(model.parameters()))
    with unchanged(model), pytest.raises(ForecastError, match=said):
        mst_compile.forecast(model, **SIZES, loss=lambda: model(x).square().mean(), optimizer=optimizer)
