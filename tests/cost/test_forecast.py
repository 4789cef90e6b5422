"""Forecasts against what runs then did, and that they leave everything as it was."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from helpers import DEBUG, Blocks, compiled, unchanged
from torch import Tensor, nn
from training import STEPS, batches, fresh, loss_of

import mst_compile
from mst_compile import Constant, MixedSparsity, Override, sparsifier, sparsify
from mst_compile.cost.flops import CompiledFlopCounter, Meter
from mst_compile.cost.forecast import SPARSE
from mst_compile.cost.rates import Rates, measure
from mst_compile.cost.timeline import timeline
from mst_compile.errors import ForecastError
from mst_compile.rules.patterns import Parts, allowed
from mst_compile.rules.schedule import Schedule

ROWS = 16

SCHEDULES: list[Schedule] = [
    MixedSparsity.published(STEPS, 0.8, warmup=8, restoration=8, settle=4, interval=3, ramp_interval=2),
    MixedSparsity.published(STEPS, 0.8, warmup=0, initial_sparsity=0.8, growth="none", interval=3),
    Constant(0.7, growth="gradient", interval=5),
    Constant(0.7, interval=5, gradient_steps=3, total_steps=STEPS),
    Constant(0.7, interval=7, gradient_steps=3),  # the event at 42 reads gradients of the last steps before 40
    Constant(0.7, growth="none"),
    MixedSparsity(STEPS),
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


class AttendingTwice(Attending):
    """On whatever batch and length, and a second time on every other position."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, 1, 32)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        z = nn.functional.scaled_dot_product_attention(*qkv[..., ::2, :], is_causal=True)
        return self.head(self.out((y[..., ::2, :] + z).transpose(1, 2).flatten(2))).square().mean()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_pattern_saves_the_share_of_the_causal_pairs_that_it_leaves_out(dynamic: bool) -> None:
    """In a step of two batches of different size, one of them of half the length; the run adds up to the forecast."""
    schedule = MixedSparsity.published(STEPS, 0.8, attention="local", stride=4, interval=3)
    model = sparsify(AttendingTwice(), schedule, exclude="head")
    torch._dynamo.reset()
    run = torch.compile(model, backend="mst", options={"mst.inner": "eager"}, dynamic=dynamic)
    inputs = torch.randn(2, 12, 32), torch.randn(3, 24, 32)

    def loss(run: Any) -> Tensor:
        with torch.no_grad():
            run(inputs[0])  # a pass that trains nothing: its attention saves nothing of a training step
        return run(inputs[0]) + run(inputs[1])

    options: dict[str, Any] = {"tokens": STEPS * 96, "tokens_per_step": 96}
    found = mst_compile.forecast(model, **options, loss=lambda: loss(run))
    by_hand = 0.0
    for batch, length in ((2, 12), (2, 6), (3, 24), (3, 12)):
        mask = allowed(Parts(window=4), length)
        share = 1 - int(mask.sum()) / (length * (length + 1) / 2)
        by_hand += 12 * batch * 32 * length * length * share
    assert found.attention_saved == pytest.approx(by_hand)
    assert sparsifier(model).attention.queries is None
    full = mst_compile.forecast(model, **options, loss=lambda: loss(model))
    assert full.attention_saved == 0.0  # in eager mode attention stays full
    assert full.rest == found.rest
    steps = sum(schedule.attention_at(t) != "full" for t in range(STEPS))
    assert 0 < steps < STEPS
    assert found.flops == pytest.approx(full.flops - steps * by_hand)
    assert found.dense_flops == full.dense_flops
    meter = Meter(model, 96, rest=found.rest, attention_saved=found.attention_saved)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        meter.step()
        model(inputs[0]).backward()
        optimizer.step()
    assert found.flops == pytest.approx(meter.flops, rel=1e-6)


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
    """With a made-up clock: 2 s, 3 us an active element, 1 us an inactive one of a dense gradient; dense 5 s; attention
    with a pattern saves half a second."""
    model = fresh(MixedSparsity.published(STEPS, 0.8, attention="sparse"))
    own = sparsifier(model)
    total = sum(w.numel for w in own.weights.values())

    def made_up(model: nn.Module, loss: Any) -> float:
        active = sum(w.active for w in own.weights.values())
        dense_grad = next(iter(own.weights.values())).dense_grad
        full = 5.0 if active == total else 2.0 + 3e-6 * active + 1e-6 * (total - active) * dense_grad
        return full - 0.5 * (own.attention.pattern == "sparse")

    monkeypatch.setattr("mst_compile.cost.rates._pass", made_up)
    rates = measure(model, lambda: torch.zeros(()))
    assert rates.fixed == pytest.approx(2.0)
    assert rates.per_element == pytest.approx(3e-6)
    assert rates.per_gradient == pytest.approx(1e-6)
    assert rates.dense == 5.0
    assert rates.attention == pytest.approx(0.5)
    assert own.attention.pattern == "full"


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


@pytest.mark.parametrize("total", [Constant(0.5, growth="none"), None])
def test_layers_that_stay_dense_are_counted(total: Schedule | None) -> None:
    """Also those that Hugging Face calls Conv1D; both ways to count agree where there is no attention."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(16, 32), conv1d(24, 32), nn.Linear(24, 8))
    x = torch.randn(4, 16, requires_grad=True)
    options: dict[str, Any] = {"tokens": 40, "tokens_per_step": 4}
    if total is None:
        model = sparsify(model, Constant(0.5, growth="none"), exclude=["1.*", "0.*"])
        found = [mst_compile.forecast(model, **options, loss=lambda: model(x).sum())]
        found.append(mst_compile.forecast(model, **options))
        dense = 6 * (16 * 32 + 32 * 24)
        first = 2 * 4 * 16 * 32  # the input's gradient is not asked for
        assert [f.rest for f in found] == [4 * dense - first, 4 * dense]
    else:
        found = [mst_compile.forecast(model, total, **options, exclude="1.*")]
        assert found[0].rest == 4 * 6 * 32 * 24


def test_phases_are_the_schedules() -> None:
    schedule = MixedSparsity.published(100, 0.9, warmup=10, restoration=20, settle=5)
    found = mst_compile.forecast(Blocks(), schedule, tokens=90 * 8, tokens_per_step=8)
    phases = [(p.name, p.start, p.stop) for p in found.phases]
    assert phases == [("warm-up", 0, 10), ("plateau", 10, 75), ("restoration", 75, 90)]  # the run ends within
    assert sum(p.flops for p in found.phases) == found.flops
    whole = mst_compile.forecast(Blocks(), schedule, tokens=100 * 8 - 1, tokens_per_step=8)  # the last step is begun
    assert whole.phases[-1].name == "settle"
    assert whole.phases[-1].stop == 100
    assert whole.phases[-1].flops == whole.phases[-1].dense_flops
    assert [p.name for p in mst_compile.forecast(Blocks(), Constant(0.5), tokens=80, tokens_per_step=8).phases] == [
        "training"
    ]


def test_numbers_are_the_expressions_values() -> None:
    found = mst_compile.forecast(Blocks(), MixedSparsity(50), tokens=400, tokens_per_step=8)
    flops = found.expressions["flops"]
    symbols = {"steps", "tokens", "active", "gradient", "rest", "pattern_steps", "attention_saved"}
    assert {s.name for s in flops.free_symbols} == symbols
    assert found.flops == pytest.approx(sum(float(flops.subs(p.values)) for p in found.phases))


class OwnSchedule:
    """Written by a user: no gradient steps, no attention, events at odd places."""

    growth, gradient_share, distribution = "mixed", 0.5, "uniform"
    max_sparsity, min_sparsity = 0.8, 0.5

    def sparsity_at(self, step: int) -> float:
        return 0.8 if 11 <= step < 30 else 0.5

    def drop_fraction_at(self, step: int) -> float:
        return 0.2

    def is_topology_event(self, step: int) -> bool:
        return step in (1, 2, 11, 17, 30, STEPS)


def test_a_users_schedule_is_one_phase() -> None:
    model = sparsify(Blocks(), OwnSchedule())
    expected = mst_compile.forecast(model, tokens=STEPS * ROWS, tokens_per_step=ROWS)
    assert [p.name for p in expected.phases] == ["training"]
    meter, optimizer = Meter(model, ROWS), torch.optim.SGD(model.parameters(), 1e-2)
    for x in batches():
        optimizer.zero_grad()
        meter.step()
        loss_of(model, x).backward()
        optimizer.step()
    assert expected.flops == pytest.approx(meter.flops, rel=1e-12)


ALL_KINDS = MixedSparsity.published(
    STEPS, 0.8, warmup=8, restoration=8, settle=5, interval=3, ramp_interval=2, attention="sparse"
)


@pytest.mark.parametrize("schedule", [ALL_KINDS, OwnSchedule()])
def test_seconds_are_those_of_the_rates(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: what each step costs by its kind, of a schedule that has all kinds, and of one with a last event."""
    model = sparsify(Blocks(), schedule)
    own, total = sparsifier(model), sum(w.numel for w in sparsifier(model).weights.values())
    rates = Rates(2.0, 3e-6, 1e-6, 5.0, 7.0, 0.7, 0.25, 0.125, attention=0.5)
    monkeypatch.setattr(sys.modules["mst_compile.cost.forecast"], "measure", lambda *_, **__: rates)
    x = next(batches())
    options: dict[str, Any] = {"tokens": STEPS * ROWS, "tokens_per_step": ROWS, "loss": lambda: loss_of(model, x)}
    expected = mst_compile.forecast(model, **options)
    by_hand, optimizer, kinds = 0.0, torch.optim.SGD(model.parameters(), 1e-2), set()
    for step, batch in enumerate(batches()):
        active = sum(w.active for w in own.weights.values())
        more = sum(w.numel - w.active for w in own.weights.values() if w.dense_grad)
        sparse = active < 0.7 * total
        by_hand += 2.0 + 3e-6 * active + 1e-6 * more if sparse else 5.0
        by_hand += 0.25 + 0.125 * schedule.is_topology_event(step + 1) - 0.5 * (own.attention.pattern != "full")
        kinds.add((sparse, more > 0, own.attention.pattern))
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    assert len(kinds) >= (4 if schedule is ALL_KINDS else 2)
    assert expected.seconds == pytest.approx(by_hand, rel=1e-9)


def test_a_backbone_is_always_active() -> None:
    """However little a weight's density leaves of it."""
    own = sparsifier(sparsify(Blocks(), Constant(0.7, growth="none")))
    before, first = timeline(own, 3), next(iter(own.weights.values()))
    share = first.active
    first.backbone.fill_(True)
    assert timeline(own, 3).active.tolist() == (before.active + first.numel - share).tolist()


def test_long_runs_are_forecast_quickly() -> None:
    """Layers are looked at where something changes, not at every step."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)])
    own = sparsifier(sparsify(model, MixedSparsity.published(100_000)))
    calls = 0
    original = type(own).densities

    def counted(self: Any, sparsity: float) -> list[float]:
        nonlocal calls
        calls += 1
        return original(self, sparsity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(own), "densities", counted)
        mst_compile.forecast(model, tokens=100_000, tokens_per_step=1)
    ramps = sum(own.schedule.is_topology_event(t) for t in range(100_000) if own.schedule.sparsity_at(t) < 0.9)
    assert 2 < calls <= ramps + 2


def test_buffers_and_the_count_of_foreign_steps_stay() -> None:
    """Batch statistics, and the warning that an optimizer trains nothing that is sparse."""
    model = sparsify(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5)), Constant(0.5))
    optimizer, x = torch.optim.SGD(model.parameters(), 1e-2), torch.randn(8, 32)
    model(x).square().mean().backward()  # gradients are there, and no step has been taken
    before = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    rng = torch.get_rng_state()
    for _ in range(3):
        mst_compile.forecast(
            model, tokens=80, tokens_per_step=8, loss=lambda: model(x).square().mean(), optimizer=optimizer
        )
    assert all(torch.equal(b, before[n][1]) and id(b) == before[n][0] for n, b in model.named_buffers())
    standstill = sparsifier(model)._stepping._standstill
    assert standstill._foreign_steps == 0
    assert [looks.arrivals for looks in standstill._looks.values()] == [1]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), rng)


def test_an_optimizer_in_the_backward_pass_is_refused_before_it_steps() -> None:
    model = fresh()
    optimizers = {p: torch.optim.AdamW([p], 1e-2) for p in model.parameters() if p.dim() == 2}  # the sparse ones
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    x = next(batches())
    with unchanged(model), pytest.raises(ForecastError, match="AdamW steps within the backward pass"):
        mst_compile.forecast(model, tokens=100, tokens_per_step=ROWS, loss=lambda: loss_of(model, x))
    assert sparsifier(model).step_count == 0
    assert not sparsifier(model)._run.optimizers  # it has not even heard of them
    assert not any(o.state for o in optimizers.values())
    loss_of(model, x).backward()  # the refusal has gone
    assert sparsifier(model).step_count == 1


def test_other_models_may_step_while_one_is_measured() -> None:
    model, other = fresh(), nn.Linear(3, 3)
    optimizer, x = torch.optim.SGD(other.parameters(), 1.0), next(batches())

    def loss() -> Tensor:
        other(torch.ones(3)).sum().backward()
        optimizer.step()
        return loss_of(model, x)

    assert measure(model, loss, rounds=1).dense > 0


def test_a_forecast_leaves_the_compiled_model_sparse() -> None:
    """PyTorch's counter, which a forecast uses, makes Dynamo give up what it meets."""
    model, x = sparsify(Blocks(), Constant(0.7, growth="none")), next(batches())
    run = compiled(model)
    expected = mst_compile.forecast(model, tokens=80, tokens_per_step=ROWS, loss=lambda: loss_of(run, x))
    with CompiledFlopCounter(display=False) as counter:
        loss_of(run, x)
    assert counter.get_total_flops() == 2 * ROWS * sum(w.active for w in sparsifier(model).weights.values())
    assert expected.phases[0].values[SPARSE] == 5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_forecast_is_what_the_operators_of_a_whole_run_come_to(schedule: Schedule) -> None:
    """Counted apart from masks and schedule: by PyTorch's counter, from what a compiled run dispatches."""
    model = fresh(schedule)
    expected = mst_compile.forecast(model, tokens=STEPS * ROWS, tokens_per_step=ROWS)
    run, optimizer, counted = compiled(model), torch.optim.AdamW(model.parameters(), 1e-3), 0
    for x in batches():
        optimizer.zero_grad()
        with CompiledFlopCounter(display=False) as counter:
            loss_of(run, x.requires_grad_()).backward()  # so that the first layer has a grad-input too
        counted += counter.get_total_flops()
        optimizer.step()
    assert counted == pytest.approx(expected.flops, rel=1e-12)


def test_steps_that_run_dense_products_do_more_than_the_forecast_counts() -> None:
    """At densities a little below 1 the backend takes the dense products: a few steps of a run."""
    model = fresh(MixedSparsity.published(STEPS, 0.8, warmup=16, restoration=16, settle=2, ramp_interval=1))
    run, x = compiled(model), next(batches()).requires_grad_()
    own, name = sparsifier(model), "layers.0.1.weight"
    own.apply_mask(name, ~torch.eye(*own.masks[name].shape, dtype=torch.bool))
    meter = Meter(model, ROWS)
    meter.step()
    with CompiledFlopCounter(display=False) as counter:
        loss_of(run, x).backward()
    assert meter.flops < counter.get_total_flops() == 6 * ROWS * sum(w.numel for w in own.weights.values())


@pytest.mark.parametrize("given", [0.0, 0.35, 1.0])
def test_the_users_threshold_is_forecast(given: float) -> None:
    """Steps above the density from which the compiled model runs dense products are forecast as dense ones."""
    model = sparsify(Blocks(), MixedSparsity.published(STEPS, 0.8))
    fast = torch.compile(model, backend="mst", options={**DEBUG, "mst.dense_threshold": given})
    x = next(batches())
    found = mst_compile.forecast(model, tokens=STEPS * ROWS, tokens_per_step=ROWS, loss=lambda: loss_of(fast, x))
    assert found.rates is not None
    assert found.rates.threshold == given
    total = sum(w.numel for w in sparsifier(model).weights.values())
    line = timeline(sparsifier(model), STEPS)
    expected = int(line.share(0, STEPS)[line.active < given * total].sum())
    assert sum(p.values[SPARSE] for p in found.phases) == expected
    assert given in (0.0, 1.0) or 0 < expected < STEPS
