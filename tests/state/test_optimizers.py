"""Whoever steps, and however: one step is counted once, masks hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Blocks
from mask_cases import element_masks
from oracles import assert_within, of_rounding
from torch import Tensor, nn
from training import OPTIMIZERS, STEPS, assert_zero_outside, batches, fresh, loss_of, runner, train

from mst_compile import Constant, MixedSparsity, Override, param_groups, sparsifier, sparsify
from mst_compile.errors import BlockSizeError, MSTWarning, ScheduleError, SelectionError
from mst_compile.rules.guard import Guard, backbone

EVERY_STEP = Constant(0.6, interval=1)
OFTEN = Constant(0.6, interval=3)


# -- several optimizers are one --------------------------------------------------------------------------------------


def final(model: nn.Module) -> tuple[dict[str, Tensor], list[Tensor]]:
    return sparsifier(model).masks, [p.detach().clone() for p in model.parameters()]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    (masks, weights), (other_masks, other_weights) = final(a), final(b)
    assert all(torch.equal(mask, other_masks[n]) for n, mask in masks.items())
    assert all(torch.equal(p, q) for p, q in zip(weights, other_weights, strict=True))


@pytest.mark.parametrize("schedule", [EVERY_STEP, OFTEN, Constant(0.6, interval=4, gradient_steps=3)])
@pytest.mark.parametrize("reverse", [False, True])
def test_three_optimizers_do_what_one_does(schedule: Constant, reverse: bool) -> None:
    """Each event reads the gradients of all weights, whichever optimizer steps first."""
    one, several = fresh(schedule), fresh(schedule)
    lr = 0.3  # large: what is dropped depends on this step's update
    train(one, torch.optim.SGD(one.parameters(), lr), "none", batches())
    parts = [list(several.parameters())[i::3] for i in range(3)]
    opts = [torch.optim.SGD(part, lr) for part in parts]
    for step, x in enumerate(batches(), 1):
        loss_of(several, x).backward()
        for optimizer in reversed(opts) if reverse else opts:
            optimizer.step()
        for optimizer in opts:
            optimizer.zero_grad()
        assert sparsifier(several).step_count == step
    assert_same(one, several)


def step_in_backward(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """The recipe of PyTorch's tutorial "How to save memory by fusing the optimizer step into the backward pass"."""
    own = {p: make([p]) for p in model.parameters()}

    def hook(parameter: Tensor) -> None:
        own[parameter].step()
        own[parameter].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("mode", ["none", "aot_eager"])
@pytest.mark.parametrize("schedule", [EVERY_STEP, OFTEN])
@pytest.mark.parametrize("early", [False, True])
def test_an_optimizer_in_the_backward_pass(early: bool, schedule: Constant, mode: str) -> None:
    """One a parameter, stepping as gradients arrive; hooked before or after ``sparsify``."""

    def make(p: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(p, 1e-2, momentum=0.9)

    one = fresh(schedule)
    train(one, make(one.parameters()), mode, batches())
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Blocks()
    if early:
        step_in_backward(model, make)
    sparsify(model, schedule)
    if not early:
        step_in_backward(model, make)
    run = runner(model, mode)
    for step, x in enumerate(batches(), 1):
        loss_of(run, x).backward()
        assert sparsifier(model).step_count == step
        for name, mask in element_masks(model).items():
            assert not dict(model.named_parameters())[name].detach()[~mask].any()
    assert_same(one, model)


class Wrapper(torch.optim.Optimizer):
    """An optimizer that steps another, as Lookahead or ZeroRedundancyOptimizer do, and then moves weights itself."""

    def __init__(self, inner: torch.optim.Optimizer, fail_at: int = -1) -> None:
        self.inner, self.fail_at, self.taken = inner, fail_at, 0
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        before = sparsifier_of(self).step_count
        self.inner.step()
        assert sparsifier_of(self).step_count == before, "counted before the outer step is over"
        self.taken += 1
        if self.taken == self.fail_at:
            raise RuntimeError("out of luck")


def sparsifier_of(optimizer: Wrapper) -> Any:
    return next(iter(optimizer.inner.param_groups[0]["model"]))


def wrapped(model: nn.Module, **options: Any) -> Wrapper:
    group = {"params": list(model.parameters()), "model": [sparsifier(model)]}
    return Wrapper(torch.optim.SGD([group], 1e-2), **options)


def test_a_step_within_a_step_is_one_step() -> None:
    one, model = fresh(EVERY_STEP), fresh(EVERY_STEP)
    train(one, torch.optim.SGD(one.parameters(), 1e-2), "none", batches())
    train(model, wrapped(model), "none", batches())
    assert sparsifier(model).step_count == STEPS
    assert_same(one, model)


def test_a_step_that_raised_does_not_hide_later_ones() -> None:
    model = fresh(OFTEN)
    optimizer = wrapped(model, fail_at=2)
    data = list(batches())
    train(model, optimizer, "none", iter(data[:1]))
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, optimizer, "none", iter(data[1:2]))
    train(model, torch.optim.SGD(model.parameters(), 1e-2), "none", iter(data[2:]))
    assert sparsifier(model).step_count == len(data), "the inner step that was taken counts too"


def test_gradients_that_nobody_steps_do_not_stop_the_schedule() -> None:
    """Whether another optimizer is still to come cannot be known in the first iteration; afterwards it is."""
    model = fresh(OFTEN)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizer = torch.optim.SGD(matrices[:2], 1e-2)
    masks = sparsifier(model).masks
    for step, x in enumerate(batches(), 1):
        model.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        assert sparsifier(model).step_count == (step if step > 1 else 0)
    assert all(not torch.equal(mask, masks[n]) for n, mask in sparsifier(model).masks.items())


# -- optimizers of other arithmetic ----------------------------------------------------------------------------------


class Twisted(torch.optim.AdamW):
    """A subclass whose update fills every element, as an orthogonalised one does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p -= 1e-3 * p.mean()


@pytest.mark.parametrize("name", ["muon", "adafactor", "subclass", "lbfgs"])
def test_weights_stay_masked_under_any_optimizer(name: str) -> None:
    model = fresh(OFTEN)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "muon": lambda: torch.optim.Muon(matrices, 1e-2),
        "adafactor": lambda: torch.optim.Adafactor(model.parameters(), 1e-2),
        "subclass": lambda: Twisted(model.parameters(), 1e-3),
        "lbfgs": lambda: torch.optim.LBFGS(model.parameters(), 1e-2, max_iter=2),
    }
    optimizer = makers[name]()
    parameters = dict(model.named_parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "no graph compiled by backend", MSTWarning)  # it is trained in eager mode
        for step, x in enumerate(batches(), 1):

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                return loss

            if name == "lbfgs":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            assert sparsifier(model).step_count == step
            for n, mask in element_masks(model).items():
                assert not parameters[n].detach()[~mask].any()
                if name != "lbfgs":
                    assert not parameters[n].grad[~mask].any()  # type: ignore[index]
    told = [str(w.message) for w in caught if issubclass(w.category, MSTWarning)]
    if name in ("adafactor", "lbfgs"):
        assert len(told) == 1
        assert "keeps state that does not belong to single elements" in told[0]
    else:
        assert not told
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_known_optimizers_say_nothing(name: str) -> None:
    model = fresh(OFTEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        warnings.filterwarnings("ignore", "no graph compiled by backend", MSTWarning)  # it is trained in eager mode
        train(model, OPTIMIZERS[name](model.parameters()), "none", batches())


def test_fused_adamw_under_a_scaler() -> None:
    """The fused optimizer unscales by itself and skips steps by itself; powers of two change no rounding."""
    schedule = Constant(0.6, interval=3, gradient_steps=2)
    plain, scaled = fresh(schedule), fresh(schedule)
    make = OPTIMIZERS["adamw fused"]
    data = list(batches(20))
    train(plain, make(plain.parameters()), "none", iter(data))
    optimizer, scaler = make(scaled.parameters()), torch.amp.GradScaler("cpu", init_scale=256.0)
    for step, x in enumerate(data):
        for broken in (True, False) if step in (0, 2, 7) else (False,):  # 2: an event's step, skipped and tried again
            optimizer.zero_grad()
            scaler.scale(loss_of(scaled, x) * (float("inf") if broken else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update(new_scale=2.0 ** (5 + step % 4))
        assert sparsifier(scaled).step_count == step + 1
        assert_zero_outside(scaled, optimizer, gradients=False)
    assert_same(plain, scaled)


# -- growth ----------------------------------------------------------------------------------------------------------


def test_growth_scores_of_several_steps_are_added_up() -> None:
    """Three dense gradients before each event; what grows by gradient has the largest sum of mean squares."""
    schedule = Constant(0.6, growth="gradient", interval=5, gradient_steps=3)
    model = fresh(schedule)
    own, parameters = sparsifier(model), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    sums: dict[str, Tensor] = {}
    for step, x in enumerate(batches(), 1):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        before = own.masks
        for name, mask in element_masks(model).items():
            grad, block = parameters[name].grad, own.weights[name].grid.block
            assert grad is not None
            if step % 5 in (1, 2):
                assert not grad[~mask].any()
            else:
                score = grad.unfold(0, block, block).unfold(1, block, block).square().mean((2, 3))
                sums[name] = sums.get(name, 0) + score
        optimizer.step()
        if step % 5 == 0:
            for name, mask in own.masks.items():
                grown, left = mask & ~before[name], ~mask & ~before[name]
                assert grown.any()
                assert sums[name][grown].min() >= sums[name][left].max() * (1 - 1e-6)
            sums = {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_event_without_finite_gradients_is_skipped_and_told(bad: float) -> None:
    """Growth reads gradients that the optimizer does not: there an overflow would decide the topology."""
    model = fresh(OFTEN)
    own, optimizer = sparsifier(model), torch.optim.AdamW(model.parameters(), 1e-2)
    name, mask = next(iter(element_masks(model).items()))
    for step, x in enumerate(batches(9), 1):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        before, mask = own.masks, element_masks(model)[name]
        if step == 6:
            parameter = dict(model.named_parameters())[name]
            parameter.grad[tuple((~mask).nonzero()[0])] = bad  # type: ignore[index]
            with pytest.warns(MSTWarning, match=f"step 6 skipped: the gradient of {name} is not finite"):
                optimizer.step()
        else:
            optimizer.step()
        same = all(torch.equal(m, before[n]) for n, m in own.masks.items())
        assert same == (step not in (3, 9))
        assert_zero_outside(model, optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# -- choices of one's own --------------------------------------------------------------------------------------------


def test_overrides() -> None:
    overrides = {"layers.0.*": Override(sparsity=0.25, block=2), "layers.1.1": Override(sparsity=0.0)}
    model = fresh(Constant(0.5, interval=2), block=8, overrides=overrides)
    weights = sparsifier(model).weights
    assert [w.grid.block for w in weights.values()] == [2, 2, 8, 8]
    for _ in range(2):
        assert [w.density for w in weights.values()] == pytest.approx([0.75, 0.75, 1.0, 0.5], abs=0.02)
        train(model, torch.optim.AdamW(model.parameters()), "none", batches(5))


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        ({"nothing.*": Override(sparsity=0.5)}, SelectionError, "'nothing.\\*' matches no sparse weight"),
        ({"layers.*": 0.5}, SelectionError, "maps patterns to Override"),
        ({"layers.*": Override(block=128)}, BlockSizeError, "block=128"),
    ],
)
def test_bad_overrides(overrides: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fresh(OFTEN, block=128 if error is BlockSizeError else None, overrides=overrides)


def test_an_override_is_checked_at_once() -> None:
    with pytest.raises(BlockSizeError, match="3"):
        Override(block=3)
    with pytest.raises(ScheduleError, match="got 1"):
        Override(sparsity=1.5)


def test_gradient_steps_fit_between_events() -> None:
    with pytest.raises(ScheduleError, match="gradient_steps=6 is more than the 5 steps"):
        Constant(0.5, interval=5, gradient_steps=6)


@pytest.mark.parametrize("guard", ["coverage", "backbone", "none"])
def test_without_a_guard_any_block_may_go(guard: Guard) -> None:
    model = fresh(Constant(0.9, interval=1, drop_fraction=1.0), block=4, guard=guard)
    train(model, torch.optim.SGD(model.parameters(), 1e-2), "none", batches(10))
    weights = sparsifier(model).weights.values()
    for dim in (0, 1):
        assert all(bool(w.mask.any(dim).all()) for w in weights) == (guard != "none")
    assert all(bool(w.mask.any()) for w in weights)


@pytest.mark.parametrize("guard", ["coverage", "backbone", "none"])
def test_only_the_fixed_backbone_is_fixed(guard: Guard) -> None:
    model = fresh(Constant(0.6, interval=1, drop_fraction=1.0), block=4, guard=guard)
    weights = list(sparsifier(model).weights.values())
    first = all(bool(w.mask[backbone(w.grid.shape)].all()) for w in weights)
    train(model, torch.optim.SGD(model.parameters(), 1e-2), "none", batches(10))
    last = all(bool(w.mask[backbone(w.grid.shape)].all()) for w in weights)
    assert (first, last) == (guard != "none", guard == "backbone")


def test_an_unknown_guard_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"coverage.*backbone.*none.*got True"):
        sparsify(Blocks(), Constant(0.5), guard=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("by_tensor", [False, True])
def test_learning_rates_follow_the_density(by_tensor: bool) -> None:
    """SGD moves weights by rate times gradient, so the rate that was used can be read off; ``lr`` stays as it was."""
    schedule = MixedSparsity.published(
        STEPS, sparsity=0.8, warmup=8, restoration=8, settle=4, interval=3, ramp_interval=2
    )
    model = fresh(schedule)
    own, lr = sparsifier(model), torch.tensor(1e-2) if by_tensor else 1e-2
    optimizer = torch.optim.SGD(param_groups(model, density_rate=0.5), lr)
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 12 - 4]
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step, x in enumerate(batches()):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        density, masks = own.density, element_masks(model)
        optimizer.step()
        rate = 1e-2 / (1 + step)
        assert all(float(g["lr"]) == pytest.approx(rate) for g in optimizer.param_groups)
        decay.step()
        for name, p in model.named_parameters():
            moved = (rate * density**-0.5 if name in masks else rate) * p.grad.double()  # type: ignore[union-attr]
            both = (masks[name] & element_masks(model)[name]) if name in masks else torch.ones_like(p, dtype=torch.bool)
            allowed = of_rounding(torch.float32, times=3) * (before[name].abs() + moved.abs())
            assert_within(p.detach()[both], (before[name].double() - moved)[both], allowed[both], name)
    assert own.density == 1.0


def test_a_step_that_raises_leaves_the_learning_rate() -> None:
    model = fresh(OFTEN)
    optimizer = wrapped(model, fail_at=1)
    optimizer.param_groups[0]["density_rate"] = 1.0
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, optimizer, "none", batches(1))
    used = torch.optim.SGD(model.parameters(), 1e-2)
    train(model, used, "none", batches(1))
    assert optimizer.param_groups[0]["lr"] == used.param_groups[0]["lr"] == 1e-2


# -- where 0 is divided by 0 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "options"), [(torch.float16, {}), (torch.float32, {"eps": 0.0})])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop"])
@pytest.mark.parametrize("foreach", [False, True])
def test_an_eps_that_is_zero(name: str, foreach: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """The eps of 1e-8 of most is 0 in float16: what is masked, and so has no gradient, would become NaN."""
    model = fresh(Constant(0.6, interval=2, growth="random")).to(dtype)
    optimizer = getattr(torch.optim, name)(model.parameters(), 1e-3, foreach=foreach, **options)
    for x in batches(5):
        loss_of(model, x.to(dtype)).backward()
        optimizer.step()
        assert_zero_outside(model, optimizer)
        optimizer.zero_grad()
    assert sparsifier(model).step_count == 5
