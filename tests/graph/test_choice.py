"""Dense or sparse by measured times: for the graph, and for each product in it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers import DEBUG, compiled, static
from hypothesis import given
from hypothesis import strategies as st
from mst_compile.kernels import cpu
from mst_compile.lowering import cpu_call_times, cpu_choice, cpu_dense, cpu_times, device
from mst_compile.lowering.cpu_times import GRAD_WEIGHT, ROWS, Product
from mst_compile.lowering.device import PRODUCTS, WORTH, Layer, Times, at_crossover
from torch import Tensor, nn

import mst_compile
from mst_compile.blocks.grid import BlockGrid
from mst_compile.errors import BackendOptionError
from mst_compile.graph import backend
from mst_compile.graph.gain import saves, uniform_threshold
from mst_compile.state.sparsifier import sparsifier

SPARSE, DENSE = Times(1.0, 0.0, 0.1), Times(1.0, 5.0, 1.0)


def until(density: float) -> Times:
    """Faster sparse up to about a density."""
    return Times(1.0, 0.0, 1 / density)


# -- what is made of times ---------------------------------------------------------------------------------------------

lines = st.builds(Times, st.floats(0.1, 10), st.floats(0.001, 10), st.floats(0.001, 10), st.floats(0, 3), st.booleans())


@given(st.lists(st.lists(lines, min_size=1, max_size=3), min_size=1, max_size=4), st.data())
def test_a_graph_is_sparse_where_its_products_together_save_time(slots: list[list[Times]], data: Any) -> None:
    times = [[dict(zip(PRODUCTS, layer, strict=False))] for layer in slots]
    densities = [data.draw(st.floats(0, 1)) for _ in slots]
    at = [(t, d) for layer, d in zip(slots, densities, strict=True) for t in layer]
    dense = sum(t.dense for t, _ in at)
    calls = sum(t.call for t, _ in at)
    ours = [(t, t.fixed + t.per_density * d) for t, d in at]
    best = calls + sum(min(t.dense, seconds) if t.falls_back else seconds for t, seconds in ours)
    if saves(times, densities, chooses=True):
        assert best < dense
    else:
        assert best > 0.91 * dense  # no more is left than what both margins may cost
    sparse = calls + sum(t.fixed + t.per_density * d for t, d in at)
    if abs(sparse - WORTH * dense) > 1e-6 * dense:
        assert saves(times, densities, chooses=False) == (sparse < WORTH * dense)


@pytest.mark.parametrize(("density", "sparse"), [(0.399, True), (0.401, False)])
def test_where_a_whole_graph_chooses_it_is_dense_from_the_mean_crossover_on(density: float, sparse: bool) -> None:
    layers = [Layer(BlockGrid(64, n, 32), False, 8, torch.float32, torch.float32, True, True) for n in (64, 192)]
    slots = [[at_crossover(layer, 0.4)] for layer in layers]
    assert saves(slots, [density] * 2, chooses=False) == sparse


@given(st.lists(lines, min_size=1, max_size=5))
def test_above_its_threshold_a_graph_is_dense(products: list[Times]) -> None:
    slots = [[{"forward": times}] for times in products]
    threshold = uniform_threshold(slots, chooses=True)
    for density in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert saves(slots, [density] * len(slots), chooses=True) == (density < threshold), (density, threshold)


def test_without_times_products_are_sparse() -> None:
    """As at DDP's first call, whose inputs have no values."""
    assert saves([[], []], [0.5, 1.0], chooses=True)
    assert uniform_threshold([], chooses=False) == math.inf


# -- the backend -------------------------------------------------------------------------------------------------------


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Times]:
    """Times by product, or by kind; everything else is much faster sparse. No threshold is given."""
    times: dict[Any, Times] = {}
    monkeypatch.delenv("MST_COMPILE_DENSE_THRESHOLD")
    for answers in (cpu_choice._products, cpu_choice._calls, cpu_choice._attentions):
        monkeypatch.setattr(answers, "known", {})
        monkeypatch.setattr(answers.kept, "own", {})
    monkeypatch.setattr(cpu_choice, "_folder", _no_folder)
    monkeypatch.setattr(
        cpu_times, "measure", lambda p: times.get(p) or times.get(p.kind) or times.get((p.rows, p.cols)) or SPARSE
    )
    monkeypatch.setattr(cpu_call_times, "measure", lambda product: 1e-6)
    return times


def _no_folder() -> Any:
    raise OSError("nothing is kept")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products that ran, in order: ``"sparse rows"``, ``"dense grad-weight"``, ..."""
    seen: list[str] = []

    def note(module: Any, name: str, what: Any) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (seen.append(what(*args)), function(*args))[1])

    sides = {True: "rows", False: "cols"}
    note(cpu, "spmm", lambda x, w, bias, index, block, by_rows, out: f"sparse {sides[by_rows]}")
    note(cpu, "grad_weight", lambda *_: "sparse grad-weight")
    note(cpu_dense, "linear", lambda x, w, bias, by_rows, out: f"dense {sides[by_rows]}")
    note(cpu_dense, "grad_weight", lambda *_: "dense grad-weight")
    return seen


def step(model: nn.Module, fast: Any, x: Tensor) -> None:
    """One pass, equal to the eager one."""
    want = _gradients(model, model, x)
    for got, right in zip(_gradients(model, fast, x), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def _gradients(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_each_product_runs_the_faster_way(inner: str, speeds: dict[Any, Times], ran: list[str]) -> None:
    speeds[ROWS] = DENSE
    model = mst_compile.sparsify(nn.Linear(64, 48), static(0.7), block=8)
    fast = compiled(model, inner)
    step(model, fast, torch.randn(20, 64))
    assert ran == ["dense rows", "sparse cols", "sparse grad-weight"]
    (row,) = mst_compile.explain(model)
    assert row.kernel == "block-sparse"
    assert "dense forward at the present density, where faster" in row.status


@pytest.mark.parametrize(("call", "dense"), [(0.1, False), (0.9, False), (1.2, True)])
def test_a_graph_is_dense_where_calls_cost_what_products_save(
    call: float, dense: bool, speeds: dict[Any, Times], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three saves .93 s for 16 tokens, and 1.16 s for 20."""
    monkeypatch.setattr(cpu_call_times, "measure", lambda product: call if product.kind != GRAD_WEIGHT else call * 0.8)
    model = mst_compile.sparsify(nn.Linear(64, 48), static(0.7), block=8)
    step(model, compiled(model), torch.randn(20, 64))
    assert ran == ([] if dense else ["sparse rows", "sparse cols", "sparse grad-weight"])


def test_the_choice_follows_the_density_without_a_new_graph(speeds: dict[Any, Times], ran: list[str]) -> None:
    speeds |= {ROWS: until(0.3), GRAD_WEIGHT: until(0.6)}
    schedule = mst_compile.MixedSparsity(total_steps=40, sparsity=0.8, warmup=0.5, restoration=0.3, settle=0.1)
    model = mst_compile.sparsify(nn.Linear(64, 64), schedule, block=8)
    own, optimizer = sparsifier(model), torch.optim.SGD(model.parameters(), 1e-4)
    fast, x = compiled(model), torch.randn(20, 64)
    seen: dict[tuple[str, ...], list[float]] = {}
    for turn in range(40):
        ran.clear()
        step(model, fast, x)
        seen.setdefault(tuple(ran), []).append(own.weights["weight"].density)
        optimizer.step()
        if turn == 30:
            frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames == 1
    crossings = {
        ("sparse rows", "sparse cols", "sparse grad-weight"): (0, 0.3),
        ("dense rows", "sparse cols", "sparse grad-weight"): (0.28, 0.6),
        ("dense rows", "sparse cols", "dense grad-weight"): (0.57, 1.1),
    }
    assert seen.keys() == crossings.keys()
    for products, (low, high) in crossings.items():
        assert all(low <= density < high for density in seen[products])


def test_where_nothing_is_faster_sparse_the_graph_is_dense(speeds: dict[Any, Times], ran: list[str]) -> None:
    speeds[48, 64] = DENSE
    model = mst_compile.sparsify(nn.Linear(64, 48), static(0.7), block=8)
    fast = compiled(model)
    step(model, fast, torch.randn(20, 64))
    assert ran == []
    (row,) = mst_compile.explain(model)
    assert row.kernel == "dense"
    assert sparsifier(model).weights["weight"].uses.dense_threshold == 0.0


def test_layers_of_one_graph_choose_each_for_itself(speeds: dict[Any, Times], ran: list[str]) -> None:
    speeds[48, 64] = DENSE
    model = mst_compile.sparsify(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64)), static(0.7), block=8)
    with torch.no_grad():
        compiled(model)(torch.randn(20, 64))
    assert ran == ["dense rows", "sparse rows"]
    assert [row.status.count("dense forward") for row in mst_compile.explain(model)] == [1, 0]


def test_other_numbers_of_tokens_are_other_products(speeds: dict[Any, Times], ran: list[str]) -> None:
    """A graph with a dynamic batch asks anew, and is not compiled anew."""
    model = mst_compile.sparsify(nn.Linear(64, 64), static(0.7), block=8)
    speeds[Product(ROWS, 64, 64, 8, 4, torch.float32, torch.float32, True)] = DENSE
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for tokens, product in ((4, "dense"), (100, "sparse"), (4, "dense"), (5, "dense"), (101, "sparse")):
            ran.clear()
            torch.testing.assert_close(fast(x := torch.randn(tokens, 64)), model(x))
            # The product of 4 or 5 tokens alone would run; where no other is in the graph, the whole graph is dense.
            assert ran == (["sparse rows"] if product == "sparse" else [])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.fixture
def asked(speeds: dict[Any, Times], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that times were asked for."""
    seen: list[int] = []
    times = device.of("cpu").times

    def noting(layers: Any, tuned: bool) -> Any:
        seen.append(layers[0].tokens)
        return times(layers, tuned)

    monkeypatch.setitem(device._records, "cpu", dataclasses.replace(device.of("cpu"), times=noting))
    return seen


def test_lengths_that_come_again_are_not_asked_for_again(asked: list[int]) -> None:
    model = mst_compile.sparsify(nn.Linear(64, 64), static(0.7), block=8)
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for tokens in (4, 100, 4, 100, 4, 100):
            fast(torch.randn(tokens, 64))
    assert sorted(asked) == [4, 4, 100], "4 once more after the variant was compiled"


def test_a_cache_that_grows_is_no_other_product(asked: list[int]) -> None:
    """As of keys and values, while text is generated: only the first calls ask how long products take."""
    model = mst_compile.sparsify(nn.Linear(64, 64), static(0.7), block=8)

    def decode(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        y = model(x)
        return y, torch.cat([past, y])

    fast = compiled(decode, dynamic=True)
    past = torch.randn(3, 64)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(1, 64)
            torch.testing.assert_close(fast(x, past), decode(x, past))
            past = decode(x, past)[1]
    assert asked == [1, 1], "once more after the variant was compiled"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_graph_whose_tokens_depend_on_values_is_measured_with_many(speeds: dict[Any, Times], ran: list[str]) -> None:
    model = mst_compile.sparsify(nn.Linear(64, 48), static(0.7), block=8)

    def some(x: Tensor) -> Tensor:
        return model(x[x[:, 0] > 0])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        torch.testing.assert_close(compiled(some, dynamic=True)(x := torch.randn(20, 64)), some(x))
    assert ran == ["sparse rows"]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_threshold_overrides_what_was_measured(
    how: str, speeds: dict[Any, Times], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds |= {ROWS: DENSE, GRAD_WEIGHT: DENSE}
    options = dict(DEBUG)
    if how == "option":
        monkeypatch.setenv("MST_COMPILE_DENSE_THRESHOLD", "0.0")
        options["mst.dense_threshold"] = 0.9  # type: ignore[assignment]
    else:
        monkeypatch.setenv("MST_COMPILE_DENSE_THRESHOLD", "0.9")
    model = mst_compile.sparsify(nn.Linear(64, 48), static(0.7), block=8)
    step(model, torch.compile(model, backend="mst", options=options), torch.randn(20, 64))
    assert ran == ["sparse rows", "sparse cols", "sparse grad-weight"]
    assert cpu_choice._products.known == {}, "nothing was measured"


@pytest.mark.parametrize("text", ["often", "1.5", "-1", "nan"])
def test_a_bad_threshold_of_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_COMPILE_DENSE_THRESHOLD", text)
    with pytest.raises(BackendOptionError, match=text):
        backend._split_options(None, None)


def test_a_forecast_knows_where_the_graph_turns_dense(speeds: dict[Any, Times]) -> None:
    speeds |= {kind: until(0.5) for kind in (ROWS, cpu_times.COLS, GRAD_WEIGHT)}
    model = mst_compile.sparsify(nn.Linear(64, 64), mst_compile.MixedSparsity.published(100, 0.8), block=8)
    fast, x = compiled(model), torch.randn(20, 64)
    found = mst_compile.forecast(model, tokens=2000, tokens_per_step=20, loss=lambda: fast(x).square().sum())
    assert found.rates is not None
    assert found.rates.threshold == pytest.approx(0.47, abs=0.03)
