"""FLOPs: formulas for PyTorch's counter against arithmetic, forecasts against what runs then did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled, index_of, unchanged
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from training import STEPS, batches, fresh, loss_of

import mst_compile
from mst_compile import Constant, MixedSparsity, Override, sparsifier, sparsify, weights
from mst_compile.errors import ForecastError
from mst_compile.flops import Meter
from mst_compile.patterns import allowed
from mst_compile.rates import measure
from mst_compile.schedule import Schedule

ROWS = 16


def count(run: Any) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dense_grad", [False, True])
def test_products_count_active_elements(transposed: bool, dense_grad: bool) -> None:
    """Ragged edges by their elements: 19 x 13 in blocks of 8 has 3 x 2 blocks."""
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    active = 8 * 8 + 8 * 5 + 3 * 8 + 3 * 5
    index = index_of(mask, 19, 13, 8, dense_grad=dense_grad)
    weight, bias = torch.randn(19, 13), torch.randn(13 if transposed else 19)
    x = torch.randn(2, 7, 19 if transposed else 13)
    grad = torch.randn(2, 7, 13 if transposed else 19)
    mst = torch.ops.mst
    assert count(lambda: mst.linear(x, weight, bias, index, 8, transposed)) == 2 * 14 * active
    assert count(lambda: mst.linear_grad_input(grad, weight, index, 8, transposed)) == 2 * 14 * active
    by_weight = count(lambda: mst.linear_grad_weight(grad, x, index, 8, transposed, torch.float32, True))
    assert by_weight == 2 * 14 * (19 * 13 if dense_grad else active)


@pytest.mark.parametrize("pattern", ["full", "local", "strided", "sparse", "fixed"])
def test_attention_counts_the_patterns_pairs(pattern: str) -> None:
    q, k = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8)
    pairs = int(allowed(pattern, 40, 12, 8).sum())
    call = (q, k, k, None, None, pattern, 12, 8, 0.3)
    assert count(lambda: torch.ops.mst.attention(*call)) == 2 * 2 * (2 * 4) * pairs * 8
    out, lse = torch.ops.mst.attention(*call)
    backward = (out, q, k, k, out, lse, *call[3:])
    assert count(lambda: torch.ops.mst.attention_backward(*backward)) == 5 * 2 * (2 * 4) * pairs * 8


class ThroughOperators(TorchFunctionMode):
    """Send products with sparse weights to the operators, as the graph pass does.

    (A compiled model cannot be counted: under PyTorch's counter Dynamo leaves functions as they are.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = weights.of(args[1]) if func is nn.functional.linear else None
        if weight is None:
            return func(*args, **(kwargs or {}))
        return torch.ops.mst.linear(*args, weight.index, weight.grid.block, False)


@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_a_model_counts_what_its_kernels_do(sparsity: float, dense_grad: bool) -> None:
    """Density 1 gives exactly the dense model's total; ``Meter`` says the same of a step as PyTorch's counter."""
    x = next(batches()).requires_grad_()  # so that the first layer has a grad-input too
    model = Blocks()
    dense = count(lambda: loss_of(model, x).backward())
    sparsify(model, Constant(sparsity, growth="none"))
    for weight in sparsifier(model).weights.values():
        weight.set_dense_grad(dense_grad)
    with ThroughOperators():
        counted = count(lambda: loss_of(model, x).backward())
    meter = Meter(model, ROWS)
    meter.step()
    assert counted == meter.flops
    assert (counted == dense) == (sparsity == 0.0)


SCHEDULES: list[Schedule] = [
    MixedSparsity.published(STEPS, 0.8, warmup=8, restoration=8, settle=4, interval=3, ramp_interval=2),
    MixedSparsity.published(STEPS, 0.8, warmup=0, initial_sparsity=0.8, growth="none", interval=3),
    Constant(0.7, growth="gradient", interval=5),
    Constant(0.7, interval=5, gradient_steps=3, total_steps=STEPS),
    Constant(0.7, growth="none"),
]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("overrides", [None, {"layers.0.*": Override(sparsity=0.3)}])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_forecast_is_what_the_run_then_does(schedule: Schedule, overrides: Any, before: bool) -> None:
    plain = Blocks()
    with unchanged(plain):
        early = mst_compile.forecast(plain, schedule, tokens=STEPS * ROWS, tokens_per_step=ROWS, overrides=overrides)
    model = sparsify(plain, schedule, overrides=overrides)
    expected = early if before else mst_compile.forecast(model, tokens=STEPS * ROWS, tokens_per_step=ROWS)
    meter = Meter(model, ROWS, rest=expected.rest)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for x in batches():
        optimizer.zero_grad()
        meter.step()
        loss_of(model, x).backward()
        optimizer.step()
    assert meter.steps == STEPS
    assert expected.flops == pytest.approx(meter.flops, rel=1e-6)  # no ragged edges here: to the block
    assert expected.flops < expected.dense_flops
    assert expected.dense_flops == pytest.approx(
        STEPS * ROWS * 6 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    )
    assert expected.seconds is None


def test_ragged_edges_are_taken_at_their_mean() -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(61, 125), nn.Linear(125, 61)), Constant(0.6, interval=2), block=8)
    expected = mst_compile.forecast(model, tokens=3200, tokens_per_step=32)
    meter, optimizer = Meter(model, 32), torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        meter.step()
        model(torch.randn(32, 61)).square().mean().backward()
        optimizer.step()
    assert expected.flops == pytest.approx(meter.flops, rel=0.02)


class Attending(nn.Module):
    """A dense head, attention and sparse layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(2, 12, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.out(y.transpose(1, 2).reshape(2, 12, 32))).square().mean()


def test_the_rest_is_what_pytorch_counts() -> None:
    """Attention over all keys, forward twice one product and backward twice two; and the dense head."""
    model = sparsify(Attending(), Constant(0.5, growth="none"), exclude="head")
    x = torch.randn(2, 12, 32, requires_grad=True)
    found = mst_compile.forecast(model, tokens=240, tokens_per_step=24, loss=lambda: model(x))
    attention = 3 * 2 * 2 * (2 * 4) * 12 * 12 * 8
    # The first layer of the sum has no grad-input: nobody asked for that of x.
    assert found.rest == 6 * 24 * 320 + attention - 2 * 24 * 32 * 96
    without = mst_compile.forecast(model, tokens=240, tokens_per_step=24)
    assert without.rest == 6 * 24 * 320


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_measuring_rates_changes_nothing(mode: str) -> None:
    model = fresh()
    own, x = sparsifier(model), next(batches())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run = compiled(model, mode)
    loss_of(run, x).backward()
    optimizer.step()
    masks, step = own.masks, own.step_count
    weights = [p.detach().clone() for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    dense = [w.dense_grad for w in own.weights.values()]
    state, rng = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    found = mst_compile.forecast(
        model, tokens=STEPS * ROWS, tokens_per_step=ROWS, loss=lambda: loss_of(run, x), optimizer=optimizer
    )
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.rates is not None
    assert "plateau" in str(found)
    assert own.step_count == step
    assert all(torch.equal(mask, masks[n]) for n, mask in own.masks.items())
    assert [w.dense_grad for w in own.weights.values()] == dense
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), rng)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


def test_rates_come_out_of_the_times_that_went_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a made-up clock: 2 s, 3 us an active element, 1 us an inactive one of a dense gradient; dense 5 s."""
    model = fresh()
    own = sparsifier(model)
    total = sum(w.numel for w in own.weights.values())

    def made_up(model: nn.Module, loss: Any) -> float:
        active = sum(w.active for w in own.weights.values())
        dense_grad = next(iter(own.weights.values())).dense_grad
        return 5.0 if active == total else 2.0 + 3e-6 * active + 1e-6 * (total - active) * dense_grad

    monkeypatch.setattr("mst_compile.rates._pass", made_up)
    rates = measure(model, lambda: torch.zeros(()))
    assert rates.fixed == pytest.approx(2.0)
    assert rates.per_element == pytest.approx(3e-6)
    assert rates.per_gradient == pytest.approx(1e-6)
    assert rates.dense == 5.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tokens": 0, "tokens_per_step": 8}, "tokens must be a positive number, got 0"),
        ({"tokens": 100, "tokens_per_step": -1}, "tokens_per_step must be a positive number, got -1"),
        ({"tokens": 100, "tokens_per_step": 8}, "is not sparse: pass a schedule"),
    ],
)
def test_bad_forecasts(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ForecastError, match=text):
        mst_compile.forecast(Blocks(), **arguments)


def test_a_sparse_model_has_its_schedule() -> None:
    with pytest.raises(ForecastError, match="sparse already"):
        mst_compile.forecast(fresh(), Constant(0.5), tokens=100, tokens_per_step=8)
