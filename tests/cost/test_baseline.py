"""The dense model that a forecast compares with: the graph that Inductor alone would get, whatever is faster here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled, unchanged
from mst_compile.kernels import cpu
from mst_compile.lowering import device
from mst_compile.lowering.device import PRODUCTS, Times
from torch import Tensor, fx, nn
from training import STEPS, batches, fresh, loss_of

import mst_compile
from mst_compile import Constant, MixedSparsity, sparsifier, sparsify
from mst_compile.cost import rates
from mst_compile.cost.rates import measure
from mst_compile.graph import backend

ROWS = 16
SPARSE = Times(1.0, 0.0, 0.1)  # sparse products are faster at every density


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """This package's products and its attention are the faster ones, without a zero too."""
    monkeypatch.delenv("MST_COMPILE_DENSE_THRESHOLD")
    own = dataclasses.replace(
        device.of("cpu"),
        times=lambda layers, _: [dict.fromkeys(PRODUCTS, SPARSE) for _ in layers],
        attention_pays=lambda *_: True,
    )
    monkeypatch.setitem(device._records, "cpu", own)
    monkeypatch.setattr("mst_compile.lowering.cpu_choice.is_dense_faster", lambda *_: False)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, float, int]]:
    """Of each pass that is timed: whether it shall be a dense model's, density, how many products were sparse."""
    seen: list[tuple[bool, float, int]] = []
    ran, timed = [0], rates._pass

    def spmm(*args: Any, original: Callable[..., Any] = cpu.spmm) -> Any:
        ran[0] += 1
        return original(*args)

    def one(model: nn.Module, loss: Callable[[], Tensor]) -> float:
        ran[0], weights = 0, sparsifier(model).weights.values()
        seconds = timed(model, loss)
        density = sum(w.active for w in weights) / sum(w.numel for w in weights)
        seen.append((all(w.baseline is not None for w in weights), density, ran[0]))
        return seconds

    monkeypatch.setattr(cpu, "spmm", spmm)
    monkeypatch.setattr(rates, "_pass", one)
    return seen


def graph_of(graph_module: fx.GraphModule) -> list[str]:
    """What a graph computes, in words that do not depend on its weights."""
    return [f"{n.op} {n.target if n.op != 'placeholder' else ''} {n.args} {n.kwargs}" for n in graph_module.graph.nodes]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """All graphs that Inductor is given by this backend, which then run in eager mode."""
    seen: list[list[str]] = []

    def inner(*_: Any) -> Callable[..., Any]:
        def compile_fn(graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
            seen.append(graph_of(graph_module))
            return graph_module.forward

        return compile_fn

    monkeypatch.setattr(backend, "_inner", inner)
    return seen


class Attending(nn.Module):
    """Causal attention, a mask that says so, or PyTorch's own module, between sparse layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(32, 96), nn.Linear(32, 32)
        self.module = nn.MultiheadAttention(32, 4, batch_first=True)
        self.register_buffer("causal", torch.ones(12, 12, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "module":
            return self.module(x, x, x, need_weights=False)[0]
        q, k, v = (t.view(2, 12, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.kind == "causal":
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.causal)
        return self.out(y.transpose(1, 2).reshape(2, 12, 32))


@pytest.mark.parametrize("kind", ["linear", "causal", "mask", "module"])
@pytest.mark.parametrize("attention", ["full", "local"])
@pytest.mark.usefixtures("always_faster")
def test_the_dense_graph_is_what_dynamo_hands_over(kind: str, attention: str, graphs: list[list[str]]) -> None:
    """Products, attention and modules of the model's own, whatever the passes make of them elsewhere."""
    model: nn.Module = Blocks() if kind == "linear" else Attending(kind)
    x, alone = torch.randn(2, 12, 32), list[list[str]]()

    def plain(graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        alone.append(graph_of(graph_module))
        return graph_module.forward

    torch.compile(model, backend=plain)(x)
    torch._dynamo.reset()
    sparsify(model, MixedSparsity.published(STEPS, 0.8, attention=attention), block=8)
    run = torch.compile(model, backend="mst")
    found = measure(model, lambda: run(x).square().mean(), rounds=1)
    assert len(alone) == 1
    assert graphs.count(alone[0]) == 1
    assert len(graphs) >= 2
    assert found.baseline_is == "as torch.compile alone runs it"
    assert all(w.baseline is None for w in sparsifier(model).weights.values())


@pytest.mark.usefixtures("always_faster")
def test_products_that_are_faster_without_a_zero_too_are_not_the_dense_models(
    passes: list[tuple[bool, float, int]],
) -> None:
    model, x = fresh(), next(batches())
    run = compiled(model)
    found = measure(model, lambda: loss_of(run, x), rounds=2)
    assert found.threshold > 1
    dense = [ran for baseline, density, ran in passes if baseline and density == 1]
    assert dense == [0] * 4  # tried, to compile; once more in turn; and timed
    rest = [(density, ran) for baseline, density, ran in passes if not baseline]
    assert all(ran > 0 and density < 1 for density, ran in rest)
    assert found.dense == pytest.approx(found.fixed + found.per_element * sum(p.numel() for p in two_dim(model)))


def two_dim(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.dim() == 2)


def test_where_the_backends_dense_graph_is_the_same_it_is_timed_once(
    passes: list[tuple[bool, float, int]], graphs: list[list[str]]
) -> None:
    """Up to the density of .8 that the suite gives, products are sparse."""
    model, x = fresh(), next(batches())
    run = torch.compile(model, backend="mst")
    found = measure(model, lambda: loss_of(run, x), rounds=2)
    assert [density for baseline, density, _ in passes if baseline] == [1.0]
    assert found.baseline == found.dense
    assert len(graphs) == 2  # with sparse products, and without


def test_a_run_in_eager_mode_is_its_own_rival() -> None:
    model, x = fresh(), next(batches())
    found = mst_compile.forecast(model, tokens=STEPS * ROWS, tokens_per_step=ROWS, loss=lambda: loss_of(model, x))
    assert found.rates is not None
    assert found.rates.baseline == found.rates.dense
    assert "dense: the model as loss runs it" in " ".join(str(found).split())


@pytest.mark.usefixtures("always_faster")
def test_what_inductor_does_not_compile_is_compared_with_eager_mode(
    monkeypatch: pytest.MonkeyPatch, passes: list[tuple[bool, float, int]]
) -> None:
    def inner(*_: Any) -> Callable[..., Any]:
        def compile_fn(graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
            if not any("mst" in str(n.target) for n in graph_module.graph.nodes):
                raise LookupError("no such operator")
            return graph_module.forward

        return compile_fn

    monkeypatch.setattr(backend, "_inner", inner)
    model, x = fresh(), next(batches())
    run = torch.compile(model, backend="mst")
    loss_of(run, x)  # Dynamo marks what it has seen
    with unchanged(model):
        found = mst_compile.forecast(model, tokens=STEPS * ROWS, tokens_per_step=ROWS, loss=lambda: loss_of(run, x))
    assert [ran for _, density, ran in passes if density == 1] == [0] * 6
    assert found.rates is not None
    assert found.rates.baseline > 0
    said = "in eager mode, as Inductor does not compile it: LookupError('no such operator')"
    assert said in " ".join(str(found).split())


@pytest.mark.parametrize("at", [2, 4, 7])
@pytest.mark.usefixtures("always_faster")
def test_a_loss_that_fails_leaves_nothing_behind(at: int) -> None:
    """Also where it fails under the dense model: that is taken for a compiler's failure, once."""
    model, x, calls = fresh(), next(batches()), [0]
    run = compiled(model)
    loss_of(run, x)  # Dynamo marks what it has seen

    def loss() -> Tensor:
        calls[0] += 1
        if calls[0] >= at:
            raise ZeroDivisionError
        return loss_of(run, x)

    with unchanged(model), pytest.raises(ZeroDivisionError):
        measure(model, loss)
    assert all(w.baseline is None and not w.timed for w in sparsifier(model).weights.values())


@pytest.mark.usefixtures("always_faster")
def test_a_dense_model_under_autocast_is_cast_as_ever(passes: list[tuple[bool, float, int]]) -> None:
    model, x = fresh(), next(batches())
    run = compiled(model)
    seen: list[torch.dtype] = []

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        if next(iter(sparsifier(model).weights.values())).baseline is not None:
            seen.append(y.dtype)
        return y.float().square().mean()

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = Blocks()(x).dtype
    assert measure(model, loss, rounds=1).baseline > 0
    assert seen == [expected] * 3
    assert [ran for baseline, _, ran in passes if baseline] == [0] * 3


@pytest.mark.usefixtures("always_faster")
def test_gradients_are_the_dense_models() -> None:
    """The values are the sparse model's own, so its eager gradients are the reference."""
    model, x = sparsify(Blocks(), Constant(0.5, growth="none")), next(batches())
    own, run = sparsifier(model), compiled(model)
    loss_of(run, x).backward()
    with rates.kept(model):
        rates._set_masks(model, 0.0, False)
        told = rates.Baseline(own)
        grads: list[list[Tensor]] = []
        for made in (lambda: loss_of(model, x), lambda: loss_of(run, x)):
            model.zero_grad()
            told.try_out(lambda made=made: made().backward())  # type: ignore[misc]
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert told.differs is False  # products alone: the backend's dense graph is the same
    assert str(told) == "as torch.compile alone runs it"
    assert len(grads[0]) == len(list(model.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
